"""The command line: ``cohobate VERB ...``, or ``python -m cohobate VERB ...`` (which torchrun needs).

Every verb is a file here that imports what it needs when it runs, so ``--help`` is quick. A mistake of the user's is
one line on standard error and exit code 2; a mistake of ours keeps its traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from cohobate.cli.parsing import near
from cohobate.errors import UserError

USAGE = """cohobate: masked distillation pretraining of vision transformers

  cohobate train RECIPE [key=value ...]     a run; `cohobate train RECIPE --help` lists every key
  cohobate eval METRIC WEIGHTS DATA         quality on labelled images, videos: knn, linear, attentive, finetune
  cohobate data make|inspect|shard ...      generate labelled images or clips; look at a data set; shards of JPEG frames
  cohobate report RUN                       write the report page of a run
  cohobate viz WEIGHTS IMAGES --out FOLDER  pictures: masks, features, attention, reconstructions, nearest images
  cohobate bench NAME [options]             measured tables; `cohobate bench` lists them
  cohobate plan RECIPE [key=value ...]      GFLOP, memory, hours and decode rate of a run, before it is started
  cohobate convert SOURCE DESTINATION       checkpoints of dBOT, MAE, VideoMAE, AMD, timm, Hugging Face, in and out
  cohobate info                             what works here, and why the rest does not

`cohobate VERB --help` says more. With several processes: torchrun --nproc-per-node N -m cohobate train RECIPE ...
"""

VERBS = {
    "train": "train",
    "eval": "evaluate",
    "data": "data",
    "report": "report",
    "viz": "viz",
    "bench": "bench",
    "plan": "plan",
    "convert": "convert",
    "info": "info",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 for a mistake of the user's, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("cohobate: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cohobate info | head`: nobody reads on, and the interpreter must not flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError) as error:
        if not _is_users(error):
            raise
        print(f"cohobate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """UserError; a file that cannot be opened; or a ValueError or TypeError that this package raised itself."""
    if isinstance(error, OSError):
        return error.filename is not None
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and Path(__file__).resolve().parents[1] in Path(frames[-1].filename).resolve().parents
    kernels = importlib.util.find_spec("cohobate.kernels")
    if not ours and frames and kernels is not None and kernels.origin is not None:
        ours = Path(kernels.origin).resolve().parent in Path(frames[-1].filename).resolve().parents
    return isinstance(error, UserError) or ours


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from cohobate import __version__

        print(f"cohobate {__version__}")
        return 0
    if arguments[0] not in VERBS:
        raise UserError(f"verb: expected one of {', '.join(VERBS)}; got {arguments[0]!r}{near(arguments[0], VERBS)}")
    return int(importlib.import_module(f"cohobate.cli.{VERBS[arguments[0]]}").main(arguments[1:]))
