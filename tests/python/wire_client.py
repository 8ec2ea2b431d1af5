"""Uploads a LoRA file and encodes with it: wire_client.py ENDPOINT MODEL LORA [PROMPT]."""
import json, struct, sys
import msgpack, zmq

endpoint, model, lora = sys.argv[1:4]
prompt = sys.argv[4] if len(sys.argv) > 4 else "a photo of a (red:1.2) fox"
socket = zmq.Context.instance().socket(zmq.DEALER)
socket.setsockopt(zmq.RCVTIMEO, 60_000)
socket.setsockopt(zmq.LINGER, 0)
socket.connect(endpoint)
count = 0


def ask(kind, attachments=(), **fields):
    global count
    count += 1
    header = msgpack.packb({"kind": kind, "id": f"py-{count}", **fields})
    socket.send_multipart([b"LUNA/1", header, *attachments])
    magic, header, *attachments = socket.recv_multipart()
    reply = msgpack.unpackb(header)
    if magic != b"LUNA/1" or reply["kind"] != f"{kind}_reply" or reply["id"] != f"py-{count}":
        sys.exit(f"{reply.get('code')}: {reply.get('message')}")
    return reply, attachments


file = open(lora, "rb").read()
begun, _ = ask("upload_lora", op="begin", size=len(file), format="lora", label="wire_client")
upload, step = begun["upload"], begun["chunk_bytes_max"]
for offset in range(0, len(file), step):
    ask("upload_lora", [file[offset:offset + step]], op="chunk", upload=upload, offset=offset)
adapter = ask("upload_lora", op="commit", upload=upload)[0]["adapter"]
stack = [{"adapter": adapter, "strength_patch": 0.8}]
reply, frames = ask("clip_encode", model=model, prompts=[{"text": prompt}], stack=stack)
cond, applied = reply["results"][0]["cond"], reply["receipt"]["stack"][0]["applied"]
first = struct.unpack_from("<8f", frames[cond["attachment"]])
print(json.dumps({"adapter": adapter, "shape": cond["shape"], "applied": applied, "first": first}))
