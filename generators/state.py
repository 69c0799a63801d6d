"""What a training changes from step to step, in one place: networks, averages, optimisers, scores.

    state = TrainingState(accelerator, {"generator": g}, {"generator": Adam(…)}, ("generator",))
    accelerator.backward(loss)
    state.update("generator")
    state.average(0.999)
    state.load(state.tensors(), state.values())      # what a checkpoint holds, checked

Shape letters: W processes.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

from generators.runs import frozen
from generators.tensors import load_state


class TrainingState:
    """Networks and optimisers by name, moving averages of some, the step and the best score."""

    def __init__(
        self,
        accelerator: Accelerator,
        modules: Mapping[str, nn.Module],  # all that has weights or counters which change
        optimisers: Mapping[str, torch.optim.Adam],  # by the name of the module that they train
        averaged: tuple[str, ...],  # names of the modules that have a moving average
    ) -> None:
        self.accelerator = accelerator
        self.modules: dict[str, Any] = dict(modules)
        self.averages: dict[str, Any] = {
            name: frozen(copy.deepcopy(self.modules[name])) for name in averaged
        }
        self.optimisers = dict(optimisers)
        self.prepared = {name: accelerator.prepare(o) for name, o in self.optimisers.items()}
        self.step = 0  # steps done
        self.best = float("inf")  # lowest held-out score so far
        self.scores: dict[str, float] = {}  # the last held-out scores

    def update(self, name: str, max_norm: float | None = None) -> None:
        """One step of a network with its gradients' mean over processes, clipped to `max_norm`."""
        average_gradients(self.modules[name], self.accelerator.num_processes)
        if max_norm is not None:
            self.accelerator.clip_grad_norm_(self.modules[name].parameters(), max_norm)
        self.prepared[name].step()
        self.prepared[name].zero_grad()

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * network; buffers are copied."""
        for name, average in self.averages.items():
            network = self.modules[name]
            pairs = list(average.parameters()), list(network.parameters())
            torch._foreach_lerp_(*pairs, 1 - decay)
            for mean, now in zip(average.buffers(), network.buffers(), strict=True):
                mean.copy_(now)

    # -------------------------------------------------------------------- checkpoints

    def networks(self) -> dict[str, nn.Module]:
        """All that a checkpoint holds the weights of."""
        averages = {f"average of {name}": net for name, net in self.averages.items()}
        return self.modules | averages

    def tensors(self) -> dict[str, Tensor]:
        """{"generator/synthesis.b4.const": …, "optimiser of generator/0.exp_avg": …}"""
        found: dict[str, Tensor] = {}
        for name, network in self.networks().items():
            found |= {f"{name}/{key}": value for key, value in network.state_dict().items()}
        for name, optimiser in self.optimisers.items():
            for i, parameter in enumerate(parameters(optimiser)):
                moments = optimiser.state.get(parameter, {})
                found |= {f"optimiser of {name}/{i}.{k}": value for k, value in moments.items()}
        return found

    def values(self) -> dict[str, Any]:
        """Everything else that a resumed run needs and that is not a function of the step."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "best": self.best,
            "scores": self.scores,
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes on what `tensors` and `values` gave. ValueError if they are another training's;
        the state is then undefined until the next `load`."""
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = tensor
        for name, network in self.networks().items():
            load_state(network, groups.pop(name, {}), f"its {name} does not fit")
        for name, optimiser in self.optimisers.items():
            load_moments(optimiser, groups.pop(f"optimiser of {name}", {}))
        if groups:
            raise ValueError(f"it holds {next(iter(groups))}, which this training has not")
        try:
            self.step, self.best = int(values["step"]), float(values["best"])
            self.scores = {str(name): float(value) for name, value in values["scores"].items()}
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(values["scaler"])
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError("its step, scores or loss scale are not there") from error


def parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimiser.param_groups for p in group["params"]]


def load_moments(optimiser: torch.optim.Adam, tensors: Mapping[str, Tensor]) -> None:
    """Adam's state of each parameter, which has none before its first gradient."""
    optimiser.state.clear()
    left = dict(tensors)
    for i, parameter in enumerate(parameters(optimiser)):
        blank = {
            "step": torch.zeros(()),  # on the CPU, as Adam has it
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        found = {key: left.pop(f"{i}.{key}") for key in blank if f"{i}.{key}" in left}
        if found:
            shapes = {key: value.shape for key, value in found.items()}
            if shapes != {key: value.shape for key, value in blank.items()}:
                raise ValueError(f"the optimiser's tensors of parameter {i} do not fit")
            optimiser.state[parameter] = {k: v.copy_(found[k]) for k, v in blank.items()}
    if left:
        raise ValueError(f"{next(iter(left))} is not the optimiser's")


def average_gradients(module: nn.Module, world: int) -> None:
    """All-reduces the gradients to their mean over processes, in one message."""
    if world == 1:
        return
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    flat /= world
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


class LossMeter:
    """Means of scalar losses between two readings, kept on the device: reading is the only sync.

    It also remembers the first step with a non-finite value: its batch can be drawn again.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.bad_step = torch.full((), -1, device=device)

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        for name, scalar in values.items():
            value = scalar.detach().to(self.dtype)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
            fresh_bad = ~torch.isfinite(value) & (self.bad_step < 0)
            self.bad_step = torch.where(fresh_bad, step, self.bad_step)

    def bad(self, world: int) -> int | None:
        """A step with a loss that was not finite in any process, or None."""
        if world > 1:
            torch.distributed.all_reduce(self.bad_step, torch.distributed.ReduceOp.MAX)
        return None if self.bad_step < 0 else int(self.bad_step)

    def read(self, world: int) -> dict[str, float]:
        """Means over steps and processes since the last reading."""
        names = sorted(self.sums)
        if not names:
            return {}
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        if world > 1:
            torch.distributed.all_reduce(means)
            means /= world
        self.sums, self.counts = {}, {}
        return dict(zip(names, means.tolist(), strict=True))

    def tensors(self, world: int) -> dict[str, Tensor]:
        """What was not read yet, of every process: {"losses/l1": sums and counts (W, 2)}."""
        found = {}
        for name in sorted(self.sums):
            own = torch.stack([self.sums[name], self.sums[name].new_tensor(self.counts[name])])
            rows = [torch.empty_like(own) for _ in range(world)]
            if world > 1:
                torch.distributed.all_gather(rows, own)
            found[f"losses/{name}"] = torch.stack(rows if world > 1 else [own])
        return found

    def load(self, tensors: dict[str, Tensor], rank: int) -> None:
        """Takes what `tensors` gave out of a checkpoint's."""
        self.sums, self.counts = {}, {}
        for key in [key for key in tensors if key.startswith("losses/")]:
            rows, name = tensors.pop(key), key.partition("/")[2]
            if rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
                raise ValueError(f"{key} are not sums and counts")
            total, count = rows[rank % len(rows)].to(self.device, self.dtype)
            self.sums[name], self.counts[name] = total, int(count)
