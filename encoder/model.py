"""The encoder: one look at a face gives its w+ latent. A timm backbone and a light attention head.

    encoder = Encoder(EncoderConfig(resolution=64, num_ws=10, w_dim=256))
    ws = encoder(images)      # (B, 3, 64, 64) in [-1, 1] -> (B, 10, 256)

Shape letters: B batch, L layers of w+, D dimension of w, R resolution, C width of the head,
T tokens, H and W height and width of a feature map.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from generators.latents import from_offsets

# what is larger is no encoder but a damaged or hostile file
MOST = {"resolution": 4096, "num_ws": 64, "w_dim": 8192, "width": 8192, "heads": 1024, "depth": 64,
        "most_tokens": 512}  # fmt: skip


@dataclass(frozen=True)
class EncoderConfig:
    backbone: str = "tf_efficientnet_lite0"  # any timm network with features_only
    resolution: int = 64  # side R of the input in pixels
    num_ws: int = 10  # L, the generator's num_ws
    w_dim: int = 256  # D, the generator's w_dim
    width: int = 192  # C, channels of the head
    heads: int = 4  # of attention
    depth: int = 2  # cross-attention layers
    most_tokens: int = 8  # a level's map is pooled to at most this many positions a side
    input_size: int = 0  # side in pixels to which pictures are enlarged first; 0: R, as they are
    shared: bool = False  # all queries together give one w of all layers, each adds to its own

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most}, not {value}")
        if self.input_size != 0 and not self.resolution <= self.input_size <= MOST["resolution"]:
            raise ValueError(
                f"input_size must be 0 or from {self.resolution} to {MOST['resolution']}, "
                f"not {self.input_size}"
            )
        if self.width % (2 * self.heads) or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of 4 and of twice the {self.heads} heads"
            )
        check_backbone(self.backbone, self.side)

    @property
    def side(self) -> int:
        """Of what the backbone looks at, in pixels."""
        return self.input_size or self.resolution


@lru_cache
def check_backbone(name: str, resolution: int) -> None:
    """ValueError unless timm's network `name` gives feature maps (B, C, H, W) of such pictures; it
    is tried without weights or memory."""
    import timm  # as in `generators.features`

    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"timm knows no network {name!r}; timm.list_models() names them")
    try:
        with torch.device("meta"):
            net = timm.create_model(name, pretrained=False, features_only=True).eval()
            maps = net(torch.zeros(1, 3, resolution, resolution))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"timm's {name} gives no feature maps of pictures of {resolution} pixels ({error}); "
            "take a convolutional one, resnet18 for example"
        ) from error
    if any(level.ndim != 4 for level in maps):
        raise ValueError(f"timm's {name} gives no feature maps; take resnet18, for example")


class Encoder(nn.Module):
    """Images (B, 3, R, R) in [-1, 1] -> ws (B, L, D): w_avg plus offsets, a learned query each.

    The backbone's batch norms keep their running statistics, so that a picture's latent does not
    depend on its batch and training on n processes equals training on one. The buffer `w_avg` (D,)
    is the generator's; whoever builds the encoder copies it there.
    """

    kind: ClassVar[str] = "encoder"
    config_class: ClassVar[type] = EncoderConfig

    scale: Tensor
    shift: Tensor
    w_avg: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        import timm

        super().__init__()
        self.config = config
        backbone: Any = timm.create_model(config.backbone, pretrained=False, features_only=True)
        if max(backbone.feature_info.reduction()) > config.side:
            stop_strides_on_one_pixel(backbone, config.side)
        self.backbone = backbone
        mean, std = (
            torch.tensor(backbone.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std")
        )
        # from [-1, 1] to the backbone's own range
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        self.register_buffer("w_avg", torch.zeros(config.w_dim))
        channels = backbone.feature_info.channels()
        self.project = nn.ModuleList(nn.Linear(c, config.width) for c in channels)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.level = nn.Parameter(torch.randn(len(channels), config.width) * 0.02)
        self.queries = nn.Parameter(torch.randn(config.num_ws, config.width) * 0.02)
        self.layers = nn.ModuleList(
            CrossAttention(config.width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.to_offsets = nn.Parameter(
            torch.randn(config.num_ws, config.width, config.w_dim) * 0.02 * config.width**-0.5
        )
        if config.shared:
            self.to_shared = nn.Linear(config.num_ws * config.width, config.w_dim)
            nn.init.normal_(self.to_shared.weight, std=0.02 * config.width**-0.5)
            nn.init.zeros_(self.to_shared.bias)

    def forward(self, images: Tensor) -> Tensor:
        if self.config.input_size:  # so that the last levels, which know most, have more positions
            images = F.interpolate(images, (self.config.side,) * 2, mode="bilinear")
        x = (images * self.scale + self.shift).contiguous(memory_format=torch.channels_last)
        levels: Any = zip(self.backbone(x), self.project, self.norms, self.level, strict=True)
        tokens = torch.cat(
            [
                project(norm(self._tokens(level))) + embedding + positions(level, self.config)
                for level, project, norm, embedding in levels
            ],
            dim=1,
        )  # (B, T, C)
        q = self.queries.expand(len(images), -1, -1)  # (B, L, C)
        for layer in self.layers:
            q = layer(q, tokens)
        q = self.norm(q)
        offsets = torch.einsum("blc,lcd->bld", q, self.to_offsets)  # (B, L, D)
        if self.config.shared:
            offsets = offsets + self.to_shared(q.flatten(1))[:, None]
        return from_offsets(offsets.float(), self.w_avg.float())

    def _tokens(self, level: Tensor) -> Tensor:
        """(B, C', H, W) -> (B, T, C'), pooled to at most most_tokens a side."""
        pooled = F.adaptive_avg_pool2d(level, pooled_size(level, self.config))
        return rearrange(pooled, "b c h w -> b (h w) c")

    def train(self, mode: bool = True) -> "Encoder":
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


@torch.no_grad()
def stop_strides_on_one_pixel(backbone: nn.Module, resolution: int) -> None:
    """Where a convolution's input is one pixel, stride 1 in place of more: the result is the same.

    For a padded channels-last convolution whose input is narrower than its stride, the weight's
    gradient in bf16 on CPU takes in memory that nobody wrote (oneDNN 3.12, backward_weights of
    jit_bf16:avx512_core_bf16): silently wrong, and at times NaN.
    """

    def look(conv: Any, inputs: tuple[Tensor, ...]) -> None:
        one_pixel = inputs[0].shape[-2:] == (1, 1)
        if one_pixel and conv.kernel_size == tuple(2 * p + 1 for p in conv.padding):
            conv.stride = (1, 1)

    convs = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    handles = [conv.register_forward_pre_hook(look) for conv in convs]
    backbone.eval()(torch.zeros(1, 3, resolution, resolution, device=convs[0].weight.device))
    backbone.train()
    for handle in handles:
        handle.remove()


def pooled_size(level: Tensor, config: EncoderConfig) -> tuple[int, int]:
    height, width = level.shape[-2:]
    return min(height, config.most_tokens), min(width, config.most_tokens)


def positions(level: Tensor, config: EncoderConfig) -> Tensor:
    """Sine and cosine of each token's place, (T, C) (Vaswani et al. 2017, section 3.5)."""
    height, width = pooled_size(level, config)
    frequencies = 2.0 ** torch.linspace(0, 4, config.width // 4, device=level.device)
    sides = [
        (torch.arange(n, device=level.device) + 0.5)[:, None] / n * frequencies * torch.pi
        for n in (height, width)
    ]
    rows, columns = (torch.cat([side.sin(), side.cos()], dim=1) for side in sides)  # (·, C / 2)
    rows, columns = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
    return rearrange(torch.cat([rows, columns], dim=2), "h w c -> (h w) c").to(level.dtype)


class CrossAttention(nn.Module):
    """Queries (B, L, C) look at tokens (B, T, C), then a perceptron; pre-norm, residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_kv, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        q = rearrange(self.q(self.norm_q(queries)), "b l (h c) -> b h l c", h=self.heads)
        k, v = rearrange(
            self.kv(self.norm_kv(tokens)), "b t (two h c) -> two b h t c", two=2, h=self.heads
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h l c -> b l (h c)")
        queries = queries + self.out(attended)
        return queries + self.mlp(self.norm_mlp(queries))
