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

from encoder.branches import Dense, Detail, Spatial, of_side, pool
from generators.images import resize
from generators.latents import from_offsets
from generators.stylegan2 import SPATIAL_SIDE

# what is larger is no encoder but a damaged or hostile file
MOST = {"resolution": 4096, "num_ws": 64, "w_dim": 8192, "width": 8192, "heads": 1024, "depth": 64,
        "most_tokens": 512}  # fmt: skip


@dataclass(frozen=True)
class EncoderConfig:
    backbone: str = "tf_efficientnet_lite0"  # any timm network with features_only
    resolution: int = 64  # side R of the input in pixels
    num_ws: int = 10  # L, the generator's num_ws: its layers, then the rows of its spatial code
    w_dim: int = 256  # D, the generator's w_dim
    width: int = 192  # C, channels of the head
    heads: int = 4  # of attention
    depth: int = 2  # cross-attention layers
    most_tokens: int = 8  # a level's map is pooled to at most this many positions a side
    input_size: int = 0  # side in pixels that the backbone looks at; 0: R, as they are
    shared: bool = False  # all queries together give one w of all layers, each adds to its own
    dense: int = 0  # channels of a map whose every place adds to that w, beside the pixels; 0: none
    spatial: int = 0  # S, channels of the generator's spatial code, of the last of the L rows
    repeated: int = 0  # layers, the last ones, that get the w of the one before them
    detail: int = 0  # channels of a branch of its own that looks at all R pixels; 0: none

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most}, not {value}")
        if not 0 <= self.input_size <= MOST["resolution"]:
            raise ValueError(
                f"input_size must be from 0 to {MOST['resolution']}, not {self.input_size}"
            )
        for name in ("dense", "spatial", "repeated", "detail"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value <= MOST["width"]:
                raise ValueError(f"{name} must be a whole number from 0 up, not {value}")
        if self.spatial * SPATIAL_SIDE**2 % self.w_dim or self.layers < 1:
            raise ValueError(
                f"a spatial code of {self.spatial} channels does not fill some of "
                f"{self.num_ws} rows of {self.w_dim}"
            )
        if self.repeated >= self.layers:
            raise ValueError(f"of {self.layers} layers {self.repeated} cannot repeat another")
        if self.width % (2 * self.heads) or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of 4 and of twice the {self.heads} heads"
            )
        check_backbone(self.backbone, self.side)

    @property
    def layers(self) -> int:
        """Rows that are a layer's w."""
        return self.num_ws - self.spatial * SPATIAL_SIDE**2 // self.w_dim

    @property
    def found(self) -> int:
        """Of these, that have a w of their own."""
        return self.layers - self.repeated

    @property
    def side(self) -> int:
        """Of what the backbone looks at, in pixels."""
        return self.input_size or self.resolution

    @property
    def seen(self) -> int:
        """Side in pixels of what the dense and the spatial branch look at."""
        return min(self.side, self.resolution)


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
    """Images (B, 3, R, R) in [-1, 1], others are resized -> ws (B, L, D): w_avg plus offsets, a
    learned query each.

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
        self.queries = nn.Parameter(torch.randn(config.found, config.width) * 0.02)
        self.layers = nn.ModuleList(
            CrossAttention(config.width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.to_offsets = nn.Parameter(
            torch.randn(config.found, config.width, config.w_dim) * 0.02 * config.width**-0.5
        )
        if config.shared:
            self.to_shared = nn.Linear(config.found * config.width, config.w_dim)
            nn.init.normal_(self.to_shared.weight, std=0.02 * config.width**-0.5)
            nn.init.zeros_(self.to_shared.bias)
        sides = [config.side // r for r in backbone.feature_info.reduction()]
        if config.dense:
            self.dense = Dense(channels, sides, config.seen, config.dense, config.w_dim)
        if config.spatial:
            self.spatial = Spatial(channels, sides, config.seen, config.spatial)
        if config.detail:
            self.detail = Detail(
                config.resolution, config.detail, config.found, config.w_dim, config.spatial
            )

    def forward(self, images: Tensor) -> Tensor:
        config, whole = self.config, resize(images, self.config.resolution)
        images = pool(whole, (config.seen,) * 2)
        maps = self.maps(images)
        levels: Any = zip(maps, self.project, self.norms, self.level, strict=True)
        tokens = torch.cat(
            [
                project(norm(tokens_of(level, config))) + embedding + positions(level, config)
                for level, project, norm, embedding in levels
            ],
            dim=1,
        )  # (B, T, C)
        q = self.queries.expand(images.shape[0], -1, -1)  # (B, L, C); len() would fix B in exports
        for layer in self.layers:
            q = layer(q, tokens)
        q = self.norm(q)
        offsets = torch.einsum("blc,lcd->bld", q, self.to_offsets)  # (B, L, D)
        if config.shared:
            offsets = offsets + self.to_shared(q.flatten(1))[:, None]
        if config.dense:
            offsets = offsets + self.dense(images, maps)[:, None]
        code = self.spatial(images, maps) if config.spatial else None
        if config.detail:
            more, more_code = self.detail(whole)
            offsets = offsets + more
            code = more_code if code is None else code + more_code
        ws = from_offsets(offsets.float(), self.w_avg.float())
        if config.repeated:
            ws = torch.cat([ws, ws[:, -1:].expand(-1, config.repeated, -1)], dim=1)
        if code is not None:
            rows = code.float().reshape(-1, config.num_ws - config.layers, config.w_dim)
            ws = torch.cat([ws, rows], dim=1)
        return ws

    def maps(self, images: Tensor) -> list[Tensor]:
        """The backbone's levels of images (B, 3, R, R), (B, C, H, W) each, the finest first."""
        x = of_side(images, self.config.side)  # a larger one gives the last levels more places
        x = (x * self.scale + self.shift).contiguous(memory_format=torch.channels_last)
        return self.backbone(x)

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


def tokens_of(level: Tensor, config: EncoderConfig) -> Tensor:
    """(B, C', H, W) -> (B, T, C'), pooled to at most most_tokens a side."""
    return rearrange(pool(level, pooled_size(level, config)), "b c h w -> b (h w) c")


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
