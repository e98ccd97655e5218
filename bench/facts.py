"""What a device is and how fast it copies, in seconds: the first thing to know of it.

python bench/facts.py [--device cuda] [--json FILE]
"""

from __future__ import annotations

import torch
from measuring import script, timing


def main() -> int:
    parser = script.parser_of(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    arguments = script.begin(parser)
    facts = timing.device_facts(arguments.device)
    for name, value in facts.items():
        print(f"{name:20} {value}")
    script.finish(arguments, {"kind": "facts", "limits": facts}, arguments.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
