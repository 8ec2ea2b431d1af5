"""Asks for the status of a farm through a REQ socket: req_status.py ENDPOINT."""
import json, sys
import msgpack, zmq

socket = zmq.Context.instance().socket(zmq.REQ)
socket.setsockopt(zmq.RCVTIMEO, 60_000)
socket.setsockopt(zmq.LINGER, 0)
socket.connect(sys.argv[1])
for number in range(2):
    socket.send_multipart([b"LUNA/1", msgpack.packb({"kind": "status", "id": f"req-{number}"})])
    magic, header = socket.recv_multipart()
    reply = msgpack.unpackb(header)
    if magic != b"LUNA/1" or reply["id"] != f"req-{number}":
        sys.exit(f"not the answer to req-{number}: {reply}")
print(json.dumps({"kind": reply["kind"], "ready": reply["ready"], "workers": len(reply["workers"])}))
