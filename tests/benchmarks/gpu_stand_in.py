"""Stands in for the process that measures: variants answer, fail, die or hang as the ``behaviour`` in settings says."""

from __future__ import annotations

import json
import os
import sys
import time


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    behaviour = dict(pair.split("=") for pair in asked["settings"]["compiler"].split(";"))
    if behaviour.get("start") == "dies":
        raise ImportError("no diffusers")
    say(machine=behaviour.get("machine", "a card"))
    for name in asked["variants"]:
        print("chatter of a library", flush=True)
        match behaviour.get(name.partition("/")[2].replace(" ", "-"), "answers"):
            case "fails":
                say(variant=name, error="RuntimeError: illegal memory access")
                sys.exit(1)
            case "dies":
                os._exit(11)
            case "hangs":
                time.sleep(600)
            case _:
                say(variant=name, result={"seconds": 0.5, "known": len(asked["results"])})
