"""The networks of SAC: policies, twin Q functions and the temperature, for continuous, discrete and routing actions."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from envs.tasks import ObservationKey
from parts.actors import TSPPointerActor
from parts.observations import ObservationEncoder
from parts.precision import rounded
from parts.views import NodeSet, View
from tools import SymexpTwoHot, symexp_bins

# The range of the logarithm of the standard deviation, before the squashing.
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
# The least that the slope of tanh counts as in a density. Without a least, each unit that an action goes farther beyond
# its bound, which moves nothing, would cost 2 nats of the entropy that is aimed at.
SLOPE_FLOOR = 1e-6
# Q1 and Q2.
TWINS = 2


class TanhNormal:
    """A normal distribution squashed into (-1, 1) by tanh (Haarnoja et al. 2018, appendix C)."""

    def __init__(self, mean: Float[Tensor, "*B A"], log_std: Float[Tensor, "*B A"]) -> None:
        """Take a network's outputs; any real `log_std` is rescaled into [-5, 2]."""
        self.mean = mean
        self.log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)

    def mode(self) -> Float[Tensor, "*B A"]:
        """The squashed mean."""
        return torch.tanh(self.mean)

    def sample(self, noise: Float[Tensor, "*B A"]) -> tuple[Float[Tensor, "*B A"], Float[Tensor, "*B"]]:
        """An action from standard normal noise, and the logarithm of its density; both with gradients.

        The slope of tanh, s = 1 - tanh(x)^2, counts as s + 1e-6 (appendix C's authors' code does so, too). log(s) is
        written as 2 (log 2 - x - softplus(-2 x)), which is finite however large x is.
        """
        x = self.mean + self.log_std.exp() * noise
        log_normal = -0.5 * noise.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - x - functional.softplus(-2 * x))
        log_slope = torch.logaddexp(log_slope, log_slope.new_full((), math.log(SLOPE_FLOOR)))
        return torch.tanh(x), (log_normal - log_slope).sum(-1)


class ObservationVector(nn.Module):
    """Reads an observation as one vector: numbers as they are, classes one-hot, images and sets encoded.

    Attributes:
        size: of the vector.
        learns: whether there is an encoder, and so something to learn.
    """

    def __init__(self, keys: dict[str, ObservationKey], *, units: int, depth: int) -> None:
        """Build what the keys ask for.

        Args:
            keys: what to read.
            units: width of what is told of a set.
            depth: multiplies the channels of image encoders.
        """
        super().__init__()
        self.keys = dict(sorted(keys.items()))
        self.flat = {name: key for name, key in self.keys.items() if key.kind in ("vector", "classes")}
        encoded = {name: key for name, key in self.keys.items() if name not in self.flat}
        self.learns = bool(encoded)
        self.encoder = ObservationEncoder(encoded, units=units, layers=1, depth=depth) if encoded else None
        self.size = sum(sum(key.classes) if key.classes else key.shape[0] for key in self.flat.values())
        self.size += 0 if self.encoder is None else self.encoder.embed_size

    def forward(self, obs: dict[str, Tensor]) -> Float[Tensor, "*B F"]:
        parts = [] if self.encoder is None else [self.encoder(obs)]
        for name, key in self.flat.items():
            if key.classes:
                values = zip(obs[name].long().unbind(-1), key.classes, strict=True)
                parts += [functional.one_hot(value, size).float() for value, size in values]
            else:
                parts.append(obs[name])
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def relu_mlp(size_in: int, size_out: int, *, units: int, layers: int) -> nn.Sequential:
    """Linear layers with ReLU in between."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(size_in, units), nn.ReLU()]
        size_in = units
    return nn.Sequential(*parts, nn.Linear(size_in, size_out))


class TanhNormalPolicy(nn.Module):
    """An MLP over the observation: a squashed normal over continuous actions."""

    def __init__(self, obs_size: int, action_size: int, *, units: int, layers: int) -> None:
        super().__init__()
        self.mlp = relu_mlp(obs_size, 2 * action_size, units=units, layers=layers)

    def forward(self, obs: Float[Tensor, "*B F"]) -> TanhNormal:
        return TanhNormal(*self.mlp(obs).float().chunk(2, -1))


class TwinMLP(nn.Module):
    """Two MLPs with ReLU that see the same input, as one batched product per layer.

    A state dict names them apart: `q1.weight0`, `q2.weight0` and so on, so that a report says which one is broken.
    """

    def __init__(self, size_in: int, size_out: int, *, units: int, layers: int) -> None:
        super().__init__()
        sizes = [size_in] + [units] * layers + [size_out]
        self.layers, self.compute = len(sizes) - 1, torch.float32
        for index in range(self.layers):
            # These are the initial values of torch.nn.Linear.
            bound = 1 / math.sqrt(sizes[index])
            weight = torch.empty(TWINS, sizes[index], sizes[index + 1], device=torch.get_default_device()).uniform_(
                -bound, bound
            )
            bias = torch.empty(TWINS, 1, sizes[index + 1], device=torch.get_default_device()).uniform_(-bound, bound)
            self.register_parameter(f"weight{index}", nn.Parameter(weight))
            self.register_parameter(f"bias{index}", nn.Parameter(bias))
        self.register_state_dict_post_hook(_tell_twins_apart)
        self.register_load_state_dict_pre_hook(_put_twins_together)

    def forward(self, x: Float[Tensor, "B I"], *, frozen: bool = False) -> Float[Tensor, "2 B O"]:
        """Both outputs; `frozen` lets gradients pass to the input and not to the parameters."""
        x = x.expand(TWINS, *x.shape)
        for index in range(self.layers):
            weight, bias = getattr(self, f"weight{index}"), getattr(self, f"bias{index}")
            # Values are learnt from one another, so the last layer must not round them.
            compute = self.compute if index + 1 < self.layers else torch.float32
            weight, bias = rounded(weight, compute), rounded(bias, compute)
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            x = torch.baddbmm(bias, x.to(compute), weight)
            if index + 1 < self.layers:
                x = torch.relu(x)
        return x


def _tell_twins_apart(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name, _ in module.named_parameters(recurse=False):
        both = state.pop(prefix + name)
        # These are views, so that numbers copied into them arrive in the parameter.
        state |= {f"{prefix}q{twin + 1}.{name}": both[twin] for twin in range(TWINS)}


def _put_twins_together(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, _parameter in module.named_parameters(recurse=False):
        keys = [f"{prefix}q{twin + 1}.{name}" for twin in range(TWINS)]
        if all(key in state for key in keys):
            state[prefix + name] = torch.stack([state.pop(key) for key in keys])


class ActionValues(nn.Module):
    """Q1 and Q2 of an observation and a continuous action: numbers, or symexp two-hot distributions."""

    bins: Tensor

    def __init__(self, obs_size: int, action_size: int, *, units: int, layers: int, bins: int | None) -> None:
        """Build the networks; `bins` is None where each Q is one number."""
        super().__init__()
        self.mlp = TwinMLP(obs_size + action_size, 1 if bins is None else bins, units=units, layers=layers)
        self.two_hot = bins is not None
        if bins is not None:
            self.register_buffer("bins", symexp_bins(bins, device=torch.get_default_device()))
            last = self.mlp.layers - 1
            # Every expectation begins at 0: bins reach to half a billion, and random weights would begin far out.
            nn.init.zeros_(getattr(self.mlp, f"weight{last}"))
            nn.init.zeros_(getattr(self.mlp, f"bias{last}"))

    def forward(
        self, obs: Float[Tensor, "B F"], action: Float[Tensor, "B A"], *, frozen: bool = False
    ) -> Float[Tensor, "2 B O"]:
        """What the networks give, for `mean` and `loss`."""
        return self.mlp(torch.cat((obs, action), -1), frozen=frozen)

    def mean(self, outputs: Float[Tensor, "2 B O"]) -> Float[Tensor, "2 B"]:
        """The expected Q of each twin."""
        return SymexpTwoHot(outputs, self.bins).mean() if self.two_hot else outputs.squeeze(-1)

    def loss(self, outputs: Float[Tensor, "2 B O"], target: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Half the squared error, or the cross-entropy, summed over the twins."""
        if self.two_hot:
            return -SymexpTwoHot(outputs, self.bins).log_prob(target.expand(TWINS, -1)).sum(0)
        return 0.5 * (outputs.squeeze(-1) - target).square().sum(0)


class PointerValues(nn.Module):
    """Q1 and Q2 of every node that could be next: two pointers, each with a node encoder of its own."""

    def __init__(self, node_features: int, *, pointer: dict[str, Any]) -> None:
        super().__init__()
        self.q1 = TSPPointerActor(0, node_features, unimix=0.0, **pointer)
        self.q2 = TSPPointerActor(0, node_features, unimix=0.0, **pointer)

    def forward(self, nodes: NodeSet, view: View) -> Float[Tensor, "2 B *Q N"]:
        return torch.stack([twin.scores(None, twin.tables(nodes), view) for twin in (self.q1, self.q2)])


class Temperature(nn.Module):
    """alpha, what a nat of entropy is worth, kept as its logarithm."""

    def __init__(self, initial: float, *, device: torch.device) -> None:
        """Begin at `initial`, on `device`: moved there later, the optimiser might hold another tensor."""
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((), math.log(initial), device=device))

    def forward(self) -> Float[Tensor, ""]:
        return self.log_alpha.exp()
