"""Runs one function of a test module as one rank of several processes; see `on_ranks`."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import distributed


def main(module: str, function: str, folder: str, joined: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    arguments = torch.load(Path(folder, "arguments.pt"), weights_only=False)
    if joined == "joined":
        distributed.init_process_group("gloo")
    torch.save(getattr(loaded, function)(*arguments), Path(folder, f"{rank}.pt"))
    if distributed.is_initialized():
        gc.collect()  # a wrapper that is part of a cycle holds the group, whose threads must end
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
