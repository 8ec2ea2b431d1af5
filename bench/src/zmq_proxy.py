"""A libzmq proxy between clients (ROUTER) and workers (DEALER); ends when standard input closes."""

import json
import os
import sys
import threading

import zmq


def end_with_parent():
    sys.stdin.read()
    os._exit(0)


context = zmq.Context()
sockets = [context.socket(zmq.ROUTER), context.socket(zmq.DEALER)]
for socket in sockets:
    # As in the broker's transport: no queue is so short that the load would fill it.
    socket.set_hwm(50_000)
    socket.bind("tcp://127.0.0.1:*")
front, back = (socket.get_string(zmq.LAST_ENDPOINT) for socket in sockets)
version = f"libzmq {zmq.zmq_version()}, pyzmq {zmq.pyzmq_version()}"
print(json.dumps({"front": front, "back": back, "version": version}), flush=True)
threading.Thread(target=end_with_parent, daemon=True).start()
zmq.proxy(*sockets)
