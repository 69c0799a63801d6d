"""Files of tensors: the one reader of weights, and the one way to put them into a network.

    state = read_weights("alexnet.pth", "AlexNet's weights, of torchvision")  # {name: tensor}
    load_state(net, state, "alexnet.pth does not fit AlexNet")                # all or nothing

What is wrong with a file is one ValueError: which file, what it is, and what would be right.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from generators.command import printable
from generators.disk import open_regular
from generators.pickles import Refused, is_torch, load_torch

WANTED = "a .safetensors file, or a .pt or .pth file that holds nothing but tensors"
WRAPPERS = ("state_dict", "params_ema", "params")  # under which other projects keep the tensors
COUNTERS = "num_batches_tracked"  # of batch norms: missing in older files, and not used here


def read_weights(path: str | Path, wanted: str = WANTED) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch.save wrote, by name; all finite.

    wanted: what to give, to end a sentence with. ValueError for all that is not such a file.
    """
    path = Path(path).expanduser()
    with _sentences(path, wanted), open_regular(path) as file:
        head = file.read(16)
        safe = head[8:9] == b"{"  # after the length of its header, whose first byte may be any
        if head[:1] == b"\x80" and not safe and not is_torch(head):
            raise Refused("is a pickle; python -m generators.convert reads those of StyleGAN2")
        state = load_torch(path) if is_torch(head) else load_file(path)
        for wrapper in WRAPPERS:
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        if not isinstance(state, dict) or not state:
            raise TypeError(f"it holds a {type(state).__name__} and no tensors by name")
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise TypeError(f"{printable(name, 80)} in it is no tensor")
            if value.nbytes > value.untyped_storage().nbytes():
                raise Refused("has a tensor larger than its storage; get the file again")
        check_finite(state)
        return state


def read_header(path: str | Path, wanted: str = WANTED) -> dict[str, str]:
    """The metadata of a .safetensors file; errors as `read_weights`."""
    path = Path(path).expanduser()
    with _sentences(path, wanted), open_regular(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@contextmanager
def _sentences(path: Path, wanted: str) -> Iterator[None]:
    """What goes wrong with a file is a ValueError that names it, and ends in what to give."""
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise TypeError("it is empty")
        yield
        return
    except Refused as error:  # has an advice of its own
        raise ValueError(f"{printable(path)}: {error}") from error
    except SafetensorError as error:
        reason = f"not a whole .safetensors file ({printable(error)})"
    except TypeError as error:
        reason = printable(error)
    except OSError as error:
        reason = error.strerror or str(error)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = f"it is damaged ({type(error).__name__}: {printable(error)})"
    raise ValueError(f"{printable(path)}: {reason}; give {wanted}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refused where a value is NaN or infinite: all that is computed with it would be so."""
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise Refused(f"{printable(name, 80)} has values that are not finite; get it again")


def load_state(module: nn.Module, tensors: Mapping[str, Any], complaint: str) -> None:
    """Copies `tensors` into `module` in its own dtypes; on any difference no copy but a ValueError:
    the complaint, and the first difference."""
    own = module.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith(COUNTERS)}
    tensors = counters | dict(tensors)
    reason = ""
    if missing := sorted(own.keys() - tensors.keys()):
        reason = f"{len(missing)} tensors are missing, {missing[0]} for one"
    elif unknown := sorted(tensors.keys() - own.keys()):
        reason = f"{len(unknown)} tensors are unknown, {printable(unknown[0], 80)} for one"
    for name, value in () if reason else tensors.items():
        if value.shape != own[name].shape:
            reason = f"{name} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}"
        elif value.is_floating_point() != own[name].is_floating_point():
            reason = f"{name} is {value.dtype}, not {own[name].dtype}"
    if reason:
        raise ValueError(f"{complaint}: {reason}")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
