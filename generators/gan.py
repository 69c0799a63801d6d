"""Generators against discriminators: StyleGAN2 and DCGAN; what is shown of them, and their scores.

    training = StyleGan2Training(config, accelerator)
    training.step(0, meter)                        # draws, and lowers the losses
    generators.loop.run(training)

Shape letters: B batch, L layers of w+, Z z dimension, D w dimension, N logits of a picture, or
pictures, R resolution.
"""

import json
from dataclasses import replace
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from generators import checkpoint
from generators.adversarial import (
    R1_INTERVAL,
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    path_length,
    path_length_penalty,
    r1_penalty,
)
from generators.augment import AdaController, ada_augment, diff_augment
from generators.command import console
from generators.constancy import constancy, feature_network, photo_source
from generators.data import (
    Pictures,
    PictureStream,
    PictureTensor,
    first_pictures,
    open_dataset,
)
from generators.dcgan import with_noise
from generators.disk import write_atomically
from generators.distances import Scores
from generators.features import FeaturePyramid, perceptual_distance
from generators.images import grid, to_float
from generators.latents import StyleLimit, mix_styles, read_ws
from generators.networks import RunningMean, adam, kl_to_prior, perceptual_network
from generators.options import AdversarialOptions, DcganOptions, StyleGan2Options
from generators.palette import Palette
from generators.patches import patch_distance
from generators.projected import ProjectedDiscriminator
from generators.runs import step_generator
from generators.state import LossMeter
from generators.steps import Draw, GeneratorTraining

PATH_INTERVAL = 4  # steps between path-length penalties (Karras et al. 2020, appendix B)
CALIBRATION = 256  # real pictures that set a projected discriminator's scales
W_AVG_DECAY = 0.995  # per step, of the running mean of w
ADA_INTERVAL = 4  # steps between the controller's decisions (Karras et al. 2020 ADA, section 3.1)
SHEET = 36  # samples
PALETTE_DRAWINGS = 2000  # whose colours are measured
# rows and columns of an FFHQ crop, in parts of the side
EYES, MOUTH = (0.38, 0.58, 0.25, 0.75), (0.59, 0.72, 0.36, 0.64)


class AdversarialTraining(GeneratorTraining):
    """A generator against a discriminator of any kind."""

    config: AdversarialOptions
    label_smoothing: float = 0.0  # of the discriminator's loss

    def __init__(self, config: AdversarialOptions, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self.discriminator = self.state.modules["discriminator"]
        self.projected = isinstance(self.discriminator, ProjectedDiscriminator)
        self.learning = [p for p in self.discriminator.parameters() if p.requires_grad]
        self.scores = None
        if accelerator.is_main_process and config.eval_data is not None:
            held_out = open_dataset(config.eval_data, self.generator.resolution)
            self.scores = Scores(
                first_pictures(held_out, config.eval_samples),
                config.eval_samples,
                config.eval_space,
                accelerator.device,
            )

    def counters(self) -> dict[str, nn.Module]:
        config = self.config
        if config.augment != "ada":
            return {}
        controller = AdaController(config.ada_target, config.ada_images)
        return {"ada": controller.to(self.accelerator.device)}

    def optimisers(self, networks: dict[str, Any]) -> dict[str, torch.optim.Adam]:
        config = self.config
        rates = {"generator": config.generator_lr, "discriminator": config.discriminator_lr}
        return {role: adam(networks[role], lr, config.betas) for role, lr in rates.items() if lr}

    def step(self, step: int, meter: LossMeter) -> None:
        """The generator's step, then the discriminator's if it plays already."""
        draw, seen = self.draw(step), step * self.pictures
        weight = self.config.adversarial_weight_at(seen)
        for group in self.state.optimisers["generator"].param_groups:
            group["lr"] = self.config.generator_lr_at(seen)
        logs, view = self.generator_step(draw, step, weight)
        if weight:
            logs |= self.discriminator_step(draw, view, step)
        meter.add(step, logs)
        self.move_average(step)

    def generator_step(
        self, draw: Draw, step: int, weight: float
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Lowers the adversarial loss of this `weight`. Returns the losses, and what the
        discriminator saw of the fakes."""
        self.train_discriminator(False)
        with self.accelerator.autocast():
            view = self.view(draw, self.generator(draw.z(self.generator)))
            loss = self.generator_loss(view)
        self.accelerator.backward(weight * loss)
        self.state.update("generator")
        return {"g": loss}, [part.detach() for part in view]

    def generator_loss(self, view: list[Tensor]) -> Tensor:
        losses = hinge_generator_loss if self.projected else generator_loss
        return losses(self.logits(view)).mean()

    def discriminator_step(self, draw: Draw, fake: list[Tensor], step: int) -> dict[str, Tensor]:
        """Real against the fakes it has just seen: the hinge loss for a projected one, the logistic
        for others. Returns the losses."""
        logs = {}
        self.train_discriminator(True)
        with self.accelerator.autocast():
            real_logits = self.logits(self.view(draw, draw.real))
            fake_logits = self.logits(fake)
            if self.projected:
                losses = hinge_discriminator_loss(real_logits, fake_logits)
            else:
                losses = discriminator_loss(real_logits, fake_logits, self.label_smoothing)
            logs["d"] = losses.mean()
            logs["d_real"], logs["d_fake"] = real_logits.mean(), fake_logits.mean()
        self.accelerator.backward(logs["d"])
        logs |= self.penalty(draw, step)
        self.state.update("discriminator")
        if "ada" in self.state.modules:
            controller = self.state.modules["ada"]
            controller.observe(real_logits, draw.world)
            if (step + 1) % ADA_INTERVAL == 0:
                controller.update()
            logs["ada_p"] = controller.p
        return logs

    def penalty(self, draw: Draw, step: int) -> dict[str, Tensor]:
        """Adds the gradients of a penalty on the discriminator."""
        return {}

    def train_discriminator(self, on: bool) -> None:
        """Gradients for the discriminator's weights, but the frozen ones, or for none."""
        for parameter in self.learning:
            parameter.requires_grad_(on)

    def view(self, draw: Draw, images: Tensor) -> list[Tensor]:
        """What the discriminator's trained part gets: pictures, augmented, or their maps."""
        seen = self.augmented(draw, images)
        return self.discriminator.features(seen) if self.projected else [seen]

    def logits(self, view: list[Tensor]) -> Tensor:
        """(B, N) of what `view` returned."""
        return self.discriminator.judge(view) if self.projected else self.discriminator(view[0])

    def augmented(self, draw: Draw, images: Tensor) -> Tensor:
        """Each call with a draw of its own."""
        if self.config.augment == "diffaugment":
            return diff_augment(images, draw.own_rng())
        if self.config.augment == "ada":
            return ada_augment(images, self.state.modules["ada"].p, draw.own_rng())
        return images

    def evaluate(self) -> dict[str, float]:
        return {} if self.scores is None else self.scores(self.average)

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """36 samples at truncation 0.8, under 6 pictures beside their reconstructions where it
        learns these. Pictures and draws are always the same."""
        z = torch.randn(
            SHEET, self.average.z_dim, generator=step_generator(self.config.seed, 0, "samples")
        )
        samples = self.average(z.to(self.accelerator.device), truncation=0.8)
        return grid(torch.cat([*self.reconstructed(), samples]), columns=12)

    def reconstructed(self) -> list[Tensor]:
        """A row of 6 pictures, each followed by its reconstruction, (12, 3, R, R); or none."""
        return []

    def at_the_end(self) -> None:
        """OUTPUT/scores.json: the last and the best weights, by truncation."""
        if self.scores is None:
            return
        report: dict[str, Any] = {
            "space": self.scores.space.name,
            "real": len(self.scores.real),
            "samples": self.config.eval_samples,
        }
        for name in ("generator", "best"):
            file = self.config.output / f"{name}.safetensors"
            network = checkpoint.load(file, type(self.average))
            report[name] = self.scores.at_the_end(network.to(self.accelerator.device))
        path = self.config.output / "scores.json"
        write_atomically(path, lambda p: p.write_text(json.dumps(report, indent=1) + "\n"))
        console.print(f"written: {path}")


class DcganTraining(AdversarialTraining):
    """Noise on what its discriminator sees, and soft targets for real pictures."""

    config: DcganOptions

    def __init__(self, config: DcganOptions, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self.label_smoothing = config.label_smoothing

    def augmented(self, draw: Draw, images: Tensor) -> Tensor:
        images = super().augmented(draw, images)
        noise = self.config.input_noise
        return with_noise(images, noise, draw.own_rng()) if noise else images


class StyleGan2Training(AdversarialTraining):
    """With reconstructions through a variational encoder, path length, style mixing, R1."""

    config: StyleGan2Options

    def __init__(self, config: StyleGan2Options, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self.variational: Any = self.state.modules.get("variational")
        weight = config.perceptual_weight * (config.reconstruction_weight + config.paired_weight)
        self.perceptual = perceptual_network(config, weight, 4, accelerator.device)
        self.latents: Tensor | None = None  # (N, L, D) at which half of the fakes are drawn
        self.found: Tensor | None = None  # the same, unlimited: where their photos are drawn
        self.palette: Palette | None = None
        self.source: Any = None  # draws the photos
        self.network: FeaturePyramid | None = None  # what looks at both
        if config.source is not None:
            self.source = photo_source(config.source, self.generator).to(accelerator.device)
            if config.constancy_weight:
                network, weights = config.constancy_network, config.feature_weights
                levels = feature_network(network, weights, config.constancy_levels)
                self.network = levels.to(accelerator.device)
        self.pairs: Tensor | None = None  # uint8 (N, 3, R, R), what each of the latents is to give
        if config.latents is not None:
            ws, below = read_ws(config.latents, self.generator), config.freeze_generator_below
            self.latents = self.found = ws = ws.to(accelerator.device)
            if config.palette_weight:
                drawings = first_pictures(self.datasets[0], PALETTE_DRAWINGS)
                self.palette = Palette(self.source, ws, drawings).to(accelerator.device)
            if config.paired_weight:
                self.pairs = paired_pictures(self.paired_data(), len(ws), config)
            if below and config.style_limit is not None:  # as translations will limit them
                self.latents = StyleLimit(self.generator, below, config.style_limit)(ws)

    def paired_data(self) -> Pictures:
        """What the latents are to give."""
        pairs = self.config.pairs
        return self.datasets[0] if pairs is None else open_dataset(pairs, self.generator.resolution)

    def prepare(self, networks: dict[str, Any]) -> None:
        discriminator = networks["discriminator"]
        if isinstance(discriminator, ProjectedDiscriminator) and not self.config.init_discriminator:
            real = first_pictures(self.datasets[0], CALIBRATION)
            discriminator.calibrate(real.to(self.accelerator.device))

    def counters(self) -> dict[str, nn.Module]:
        path = {"path": RunningMean().to(self.accelerator.device)}
        return super().counters() | (path if self.config.path_length_weight else {})

    def optimisers(self, networks: dict[str, Any]) -> dict[str, torch.optim.Adam]:
        found = super().optimisers(networks)
        if "variational" in networks:
            found["variational"] = adam(networks["variational"], 5e-4, (0.9, 0.99))
        return found

    def generator_step(
        self, draw: Draw, step: int, weight: float
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Lowers the reconstruction through the variational encoder, and the adversarial loss of
        this `weight`, on reconstructions and samples. The fakes seen are none for a weight of 0."""
        config, real = self.config, draw.real
        reconstructs = config.reconstructs_at(step * self.pictures)
        logs: dict[str, Tensor] = {}
        view: list[Tensor] = []
        z = draw.z(self.generator)
        self.train_discriminator(False)
        with self.accelerator.autocast():
            loss = torch.zeros((), device=real.device)
            if reconstructs:
                if weight:  # one pass for half a batch of reconstructions and half of samples
                    half = max(len(real) // 2, 1)
                    real, z = real[:half], z[half:]
                mean, log_variance = self.variational(real)
                code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
                code = torch.cat([code, z]) if weight else code
                fake, ws, _ = self.synthesise(code, draw, unmixed=len(real))
                logs |= self.reconstruction_terms(real, fake[: len(real)], mean, log_variance)
                loss = loss + config.reconstruction_weight * logs["reconstruction"]
            elif weight or self.pairs is not None or config.patch_weight:
                fake, ws, chosen = self.synthesise(z, draw)
                if self.pairs is not None:
                    wanted = to_float(self.pairs[chosen.cpu()]).to(fake.device)
                    terms, difference = self.difference(wanted, fake[len(fake) - len(chosen) :])
                    logs |= terms
                    loss = loss + config.paired_weight * difference
                if self.palette is not None:
                    logs["palette"] = self.palette(fake[len(fake) - len(chosen) :], chosen).mean()
                    loss = loss + config.palette_weight * logs["palette"]
                if config.patch_weight:
                    logs["patches"] = patch_distance(fake, real, draw.own_rng())
                    loss = loss + config.patch_weight * logs["patches"]
            if weight:
                again = replace(draw, rng=draw.rng.clone_state())  # for the same augmentations
                view = self.view(draw, fake)
                logs["g"] = self.generator_loss(view)
                loss = loss + weight * logs["g"]
                if config.constancy_weight or config.adaptive_weight:
                    terms = self.photo_terms(fake, ws, view, again)
                    logs |= terms
                    loss = loss + sum(getattr(config, f"{k}_weight") * terms[k] for k in terms)
        self.accelerator.backward(loss)
        if config.path_length_weight and step % PATH_INTERVAL == 0 and weight:
            logs |= self.path_length_step(draw)
        self.state.update("generator")
        if reconstructs:
            self.state.update("variational")
        return logs, [part.detach() for part in view]

    def reconstructed(self) -> list[Tensor]:
        device = self.accelerator.device
        pictures = first_pictures(self.datasets[0], 6).to(device)
        if self.variational is not None:
            again = self.average(self.variational.eval()(pictures)[0])
            self.variational.train()
        elif self.pairs is not None:
            assert self.latents is not None
            numbers = torch.arange(len(pictures)) * len(self.latents) // len(pictures)
            pictures = to_float(self.pairs[numbers]).to(device)
            again = self.average.synthesis(self.latents[numbers])
        else:
            return []
        return [torch.stack([pictures, again], dim=1).flatten(0, 1)]

    def reconstruction_terms(
        self, real: Tensor, made: Tensor, mean: Tensor, log_variance: Tensor
    ) -> dict[str, Tensor]:
        """The terms of the variational autoencoder's loss and, as "reconstruction", their sum."""
        terms, difference = self.difference(real, made)
        kl = kl_to_prior(mean, log_variance).mean()
        return terms | {"kl": kl, "reconstruction": difference + self.config.kl_weight * kl}

    def photo_terms(
        self, fake: Tensor, ws: Tensor, view: list[Tensor], draw: Draw
    ) -> dict[str, Tensor]:
        """How far drawings are from the photos of the same ws (B, L, D): in the features of a
        network, and in the discriminator's, of their `view` and of one of the photos with `draw`'s
        augmentations."""
        terms = {}
        with torch.no_grad():
            photos = self.source(ws)
        if self.network is not None:
            terms["constancy"] = constancy(self.network, fake, photos).mean()
        if self.config.adaptive_weight:
            self.discriminator.eval()  # no further power iteration of its spectral norms
            with torch.no_grad():
                wanted = self.learned(self.view(draw, photos))
            terms["adaptive"] = perceptual_distance(self.learned(view), wanted).mean()
            self.discriminator.train()
        return terms

    def learned(self, view: list[Tensor]) -> list[Tensor]:
        """Maps of the discriminator's own layers, of what `view` returned."""
        if self.projected:
            return self.discriminator.learned(view)
        return self.discriminator.features(view[0])

    def difference(self, real: Tensor, made: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """How much pictures (B, 3, R, R) differ: the terms, and their weighted sum."""
        config = self.config
        error = (real - made).abs()
        terms = {"l1": error.mean()}
        total = config.l1_weight * terms["l1"]
        if config.focus:  # squared: the median of rarely open mouths is closed
            places = {"eyes": EYES, "mouth": MOUTH}
            terms |= {key: within(error, place).square().mean() for key, place in places.items()}
            total = total + config.l1_weight * config.focus * (terms["eyes"] + terms["mouth"])
        if self.perceptual is not None:
            with torch.no_grad():
                wanted = self.perceptual(real)
            terms["perceptual"] = perceptual_distance(self.perceptual(made), wanted).mean()
            total = total + config.perceptual_weight * terms["perceptual"]
        return terms, total

    def synthesise(self, z: Tensor, draw: Draw, unmixed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, Z) -> images (B, 3, R, R) with random noise maps; moves the mean of w. All but the
        first `unmixed` get style mixing, the second half of them (with pairs: `paired_share` of
        them) given latents in place of z. Returns the ws of their photos and the numbers of the
        given latents, too."""
        generator = self.generator
        w = generator.mapping(z)  # (B, D)
        if not self.config.freeze_generator_below:
            mean = w.detach().float().mean(0)
            if draw.world > 1:
                torch.distributed.all_reduce(mean)
                mean /= draw.world
            generator.w_avg.lerp_(mean, 1 - W_AVG_DECAY)
        ws = generator.broadcast(w)  # (B, L, D)
        if self.config.style_mixing:
            share, layers = self.config.style_mixing, generator.layers
            mixed = mix_styles(ws, ws.roll(1, 0), share, draw.own_rng(), layers)
            ws = torch.cat([ws[:unmixed], mixed[unmixed:]])
        drawn, chosen = ws, torch.zeros(0, dtype=torch.long, device=ws.device)
        if self.latents is not None and self.found is not None:
            count = (len(ws) - unmixed) // 2
            if self.pairs is not None:
                count = max(1, round(len(ws) * self.config.paired_share))
            chosen = torch.randint(len(self.latents), (count,), generator=draw.own_rng())
            chosen = chosen.to(ws.device)
            drawn, ws = (
                torch.cat([ws[: len(ws) - count], given[chosen].to(ws.dtype)])
                for given in (self.latents, self.found)
            )
        return generator.synthesis(drawn, "random"), ws, chosen

    def path_length_step(self, draw: Draw) -> dict[str, Tensor]:
        """Adds the gradients of the path-length penalty on half a batch (Karras et al. 2020,
        section 3.2; lazily, appendix B)."""
        generator, running = self.generator, self.state.modules["path"]
        z = draw.z(generator)[: max(len(draw.real) // 2, 1)]
        with self.accelerator.autocast():
            ws = generator.map(z)
            images = generator.synthesis(ws, "random")
            lengths = path_length(images, ws, torch.randn_like(images))
        mean = lengths.detach().mean()
        if draw.world > 1:
            mean = self.accelerator.reduce(mean, "mean")
        running.update(mean)
        penalty = path_length_penalty(lengths, running.mean).mean()
        self.accelerator.backward(self.config.path_length_weight * PATH_INTERVAL * penalty)
        return {"path": mean}

    def penalty(self, draw: Draw, step: int) -> dict[str, Tensor]:
        """Lazy R1, of a residual discriminator."""
        if self.projected or step % R1_INTERVAL:
            return {}
        picture = self.augmented(draw, draw.real).requires_grad_(True)
        penalty = r1_penalty(self.discriminator(picture), picture).mean()
        self.accelerator.backward(penalty * self.config.r1_gamma * R1_INTERVAL)
        return {"r1": penalty}


def within(images: Tensor, place: tuple[float, float, float, float]) -> Tensor:
    """What is there of pictures (B, 3, R, R)."""
    top, bottom, left, right = (round(edge * images.shape[-1]) for edge in place)
    return images[:, :, top:bottom, left:right]


def paired_pictures(data: Pictures, latents: int, config: StyleGan2Options) -> Tensor:
    """uint8 (N, 3, R, R); ValueError unless there are as many as latents, all in memory."""
    if isinstance(data, PictureTensor) and len(data) == latents:
        return data.pictures
    count = "a stream" if isinstance(data, PictureStream) else f"{len(data)} pictures"
    raise ValueError(
        f"{config.pairs or config.data} is {count} and {config.latents} has {latents} latents, "
        "which do not pair; give both as generators.filters writes them."
    )
