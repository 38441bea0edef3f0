"""A worker without a model: `python fake_worker.py ADDRESS IDENTITY`. Answers a prompt with its own words.

Some prompts do more: `exit` ends the process, `hang` never answers, `endless` streams until cancelled, `garbage` sends
bytes that are no message and then answers. At the word `die` it dies, unless an earlier one has said something of this
answer; at `kill`, always. The environment's FAKE_WORKER=`stillborn` makes it fail before `Ready`.
"""

from __future__ import annotations

import os
import sys

from ebbflow.daemon.channel import Child
from ebbflow.daemon.process import die_with_parent
from ebbflow.formats.child_messages import Continue, Exit, LoadFailed, LoadModel, Ready, Report, SetTarget, UnloadModel
from ebbflow.formats.errors import Cancelled
from ebbflow.formats.messages import Cancel, Chunk, Finished, Generate, Resized, Started, failure
from ebbflow.formats.values import Residency


class FakeWorker:
    def __init__(self, address: str, identity: str) -> None:
        self.line = Child(address, identity)
        self.targets: dict[str, int] = {}
        self.streams: dict[int, int] = {}

    def run(self) -> None:
        self.line.send(Ready(pid=os.getpid()))
        while self.turn():
            pass
        self.line.close()

    def turn(self) -> bool:
        for message in self.line.receive(0.005 if self.streams else 5):
            match message:
                case LoadModel(model=model) if model.startswith("broken"):
                    self.line.send(LoadFailed(model=model, code="corrupt_stack", message="it is broken"))
                case LoadModel(model=model, target_nbytes=target) | SetTarget(model=model, target_nbytes=target, id=0):
                    self.targets[model] = target
                    self.line.send(Report(models=tuple(self.residency(name) for name in self.targets)))
                case SetTarget():
                    self.targets[message.model] = message.target_nbytes
                    self.line.send(Resized(id=message.id, residency=self.residency(message.model)))
                case UnloadModel():
                    del self.targets[message.model]
                case Generate():
                    self.generate(message.id, message.prompt or "")
                case Continue():
                    self.generate(message.request.id, message.request.prompt or "", len(message.ids))
                case Cancel():
                    if self.streams.pop(message.id, None) is not None:
                        self.line.send(failure(message.id, Cancelled("as you wish")))
                case Exit():
                    return False
        for stream in self.streams:
            self.streams[stream] += 1
            self.line.send(Chunk(id=stream, text="more ", tokens=self.streams[stream]))
        return True

    def generate(self, stream: int, prompt: str, said: int = 0) -> None:
        if prompt == "exit":
            sys.stderr.write("told to leave\n")
            sys.stderr.flush()
            os._exit(3)
        if prompt == "garbage":
            self.line._socket.send_multipart([b"EBB\x01", b"\xc1"])
            self.line._socket.send_multipart([b"?"])
        words = prompt.split()
        self.line.send(Started(id=stream, prompt_tokens=len(words)))
        if prompt == "endless":
            self.streams[stream] = 0
        elif prompt != "hang":
            for count, word in list(enumerate(words, 1))[said:]:
                if word == "kill" or (word == "die" and not said):
                    self.line.close()
                    os._exit(3)
                self.line.send(Chunk(id=stream, text=word + " ", tokens=count, ids=(count,)))
            self.line.send(
                Finished(
                    id=stream, reason="stop", prompt_tokens=len(words), tokens=len(words), seconds_to_first=0, seconds=0
                )
            )

    def residency(self, model: str) -> Residency:
        target = self.targets[model]
        return Residency(
            model=model,
            blocks=1,
            total_blocks=2,
            nbytes=target,
            total_nbytes=10**9,
            base_nbytes=1,
            target_nbytes=target,
        )


if __name__ == "__main__":
    die_with_parent()
    if os.environ.get("FAKE_WORKER") == "stillborn":
        raise SystemExit("no strength to live")
    FakeWorker(sys.argv[1], sys.argv[2]).run()
