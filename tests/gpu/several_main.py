"""One rank of a case of `several.py`: `python -m tests.gpu.several_main JOB.json`.

Writes what it found into the job's folder, `RANK.json`, after every part, so that a rank that dies leaves the parts
before.
"""

import json
import os
import sys
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.gpu.several_load import load_and_save, write
from tests.gpu.several_rank import Job, Skip, train

KINDS = {"write": write, "load": load_and_save}
"""What a rank does where that is not to train."""


def main(path: str) -> None:
    """Do the job in the file, and leave without exit handlers, which wait for ranks that may have died."""
    given = json.loads(Path(path).read_text())
    job = Job(**{field.name: given[field.name] for field in fields(Job)})
    file = Path(job.folder, f"{os.environ.get('RANK', '0')}.json")
    found: dict[str, Any] = {"parts": []}
    try:
        for part in KINDS.get(job.kind, train)(job):
            found |= {"parts": [*found["parts"], part]} | about(job)
            file.write_text(json.dumps(found))
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
        status = "skipped" if isinstance(error, Skip) else "out of memory" if full else "failed"
        found |= about(job) | {"status": status, "reason": str(error) if isinstance(error, Skip) else text}
    else:
        found["status"] = "ok"
        if dist.is_initialized():
            dist.barrier()
    file.write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(found["status"] == "failed" or found["status"] == "out of memory")


def about(job: Job) -> dict[str, str]:
    """What the numbers are of."""
    import transformers

    name = torch.cuda.get_device_name() if job.device == "cuda" else "cpu"
    return {"gpu": name, "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main(sys.argv[1])
