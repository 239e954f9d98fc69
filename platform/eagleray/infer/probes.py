"""The probe set: a few images that travel with a bundle, and the answers that every engine must give for them.

``probes.safetensors`` holds ``images`` (uint8 N,H,W,3, at the bundle's input size, as its ImageSpec gives them), and
``logits`` (float32 N,C) and ``embedding`` (float32 N,D, where the bundle gives one) of the FP32 model by the reference
runtime; its metadata holds the SHA-256 of each image and says which runtime that was. A bundle that is made of another
one (quantised, certified) keeps the set of its parent, so that what it is held to stays the FP32 model. The set is no
part of the model: model_digest does not change with it.

Example:
    >>> save_bundle(out, draft, weights, probes=make_probes)
    >>> read_probes(load_bundle(out)).logits.shape
    (16, 1000)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from eagleray.core.errors import ArtifactError
from eagleray.core.storage import sha256_bytes
from eagleray.core.tables import resolve
from eagleray.infer.runtimes import RUNTIMES, Float32, Uint8
from eagleray.vision.bundle import PROBES, SAFETENSORS, ModelBundle
from eagleray.vision.images import ImageSpec

SCHEMA = 1
NUM_PROBES = 16
IMAGES, LOGITS, EMBEDDING, ABOUT = "images", "logits", "embedding", "eagleray"


@dataclass(frozen=True)
class Probes:
    """Images and what is expected of them.

    Attributes:
        images_u8_nhwc: uint8, shape (N, H, W, 3), in the colour order of the bundle's ImageSpec.
        logits: float32, shape (N, C): the model's first output for them.
        embedding: float32, shape (N, D); None where the bundle gives none. Of a backbone without classes it is all.
        reference: Name, version and device of the runtime that gave them.
        digests: SHA-256 of each image's bytes, in hex.
    """

    images_u8_nhwc: Uint8
    logits: Float32
    embedding: Float32 | None = None
    reference: Mapping[str, str] = field(default_factory=dict)
    digests: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images_u8_nhwc)


def make_probes(bundle: ModelBundle, images_u8_nhwc: Uint8 | None = None) -> bytes:
    """The bytes of probes.safetensors for a bundle in FP32.

    Args:
        bundle: Its weights, where they lie.
        images_u8_nhwc: uint8, shape (N, H, W, 3), N >= 1: what the model will see; None: generated ones.

    Raises:
        ArtifactError: The model cannot be compiled, or its answers are not finite numbers.
        CapabilityError: The reference runtime is not installed.
    """
    from safetensors.numpy import save

    probes = ask(bundle, generated_images(bundle.image_spec) if images_u8_nhwc is None else images_u8_nhwc)
    about = {"schema": SCHEMA, "reference": dict(probes.reference), "sha256": list(probes.digests)}
    tensors = {IMAGES: probes.images_u8_nhwc, LOGITS: probes.logits}
    if probes.embedding is not None:
        tensors[EMBEDDING] = probes.embedding
    return bytes(save(tensors, metadata={ABOUT: json.dumps(about, sort_keys=True)}))


def ask(bundle: ModelBundle, images_u8_nhwc: Uint8) -> Probes:
    """What the reference runtime, on the CPU, answers: torch where the bundle holds its weights, else onnx.

    Raises:
        ArtifactError, CapabilityError: As make_probes says.
    """
    name, threads = "onnx", 1
    if SAFETENSORS in bundle.files:
        import torch

        name, threads = "torch", torch.get_num_threads()  # it is one setting of the process: left as it is
    runtime = resolve(RUNTIMES, name, what="runtime")(
        bundle, threads=threads, wants_embedding=bundle.embedding_dim is not None
    )
    images = np.ascontiguousarray(images_u8_nhwc)
    outputs = runtime.run(images)
    logits = np.ascontiguousarray(outputs.logits)
    embedding = None if outputs.embedding is None else np.ascontiguousarray(outputs.embedding)
    if not np.isfinite(logits).all() or (embedding is not None and not np.isfinite(embedding).all()):
        raise ArtifactError(
            f"the model of {bundle.name} gives values that are not finite for its probe set",
            expected="finite outputs for every picture",
            fix="train or import the model again",
        )
    reference = {"runtime": runtime.name, "version": runtime.version, "device": runtime.device}
    return Probes(images, logits, embedding, reference, _digests(images))


def read_probes(bundle: ModelBundle) -> Probes | None:
    """The probe set of a bundle, from bytes whose digest was checked; None when it has none, as older ones.

    Raises:
        ArtifactError: It is of a newer schema, or does not fit the bundle.
    """
    return parse_probes(bundle, bundle.read_verified(PROBES)) if PROBES in bundle.files else None


def parse_probes(bundle: ModelBundle, data: bytes) -> Probes:
    """The probe set in bytes that the caller trusts; see read_probes."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
        images, logits, embedding = tensors[IMAGES], tensors[LOGITS], tensors.get(EMBEDDING)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # where safetensors keeps metadata
        about = json.loads(header["__metadata__"][ABOUT])
        schema, digests = int(about["schema"]), tuple(map(str, about["sha256"]))
        reference = {str(key): str(value) for key, value in about["reference"].items()}
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _unfit(bundle, f"it cannot be read ({str(error)[:100]})") from None
    if schema > SCHEMA:
        raise _unfit(bundle, f"it has schema {schema}, newer than this version's {SCHEMA}")
    spec = bundle.image_spec
    shape = (len(images), spec.height, spec.width, 3)
    if images.dtype != np.uint8 or images.shape != shape or not len(images):
        raise _unfit(bundle, f"its images are {images.dtype} {images.shape}")
    if logits.dtype != np.float32 or logits.shape != (len(images), len(bundle.labels)) or not np.isfinite(logits).all():
        raise _unfit(bundle, f"its logits are {logits.dtype} {logits.shape}")
    if embedding is not None and (
        embedding.dtype != np.float32
        or embedding.shape != (len(images), bundle.embedding_dim)
        or not np.isfinite(embedding).all()
    ):
        raise _unfit(bundle, f"its embedding is {embedding.dtype} {embedding.shape}")
    if digests != _digests(images):
        raise _unfit(bundle, "an image is not the one that its digest says")
    return Probes(images, logits, embedding, reference, digests)


def _unfit(bundle: ModelBundle, seen: str) -> ArtifactError:
    return ArtifactError(
        f"the probe set of {bundle.name} cannot be used: {seen}",
        expected=f"uint8 images of the bundle's size and float32 logits of its {len(bundle.labels)} labels",
        fix="get the bundle again, or import again",
    )


def _digests(images: Uint8) -> tuple[str, ...]:
    return tuple(sha256_bytes(image.tobytes()) for image in images)


def generated_images(spec: ImageSpec, count: int = NUM_PROBES, *, seed: int = 0) -> Uint8:
    """Pictures for a model without a corpus: soft colours, one shape with an edge, some noise; no two alike.

    Args:
        spec: Gives the size.
        count: How many.
        seed: The same seed gives the same pictures.

    Returns:
        uint8, shape (count, H, W, 3).
    """
    y, x = np.mgrid[0 : spec.height, 0 : spec.width].astype(np.float32)
    y, x = y / spec.height, x / spec.width
    pictures = np.empty((count, spec.height, spec.width, 3), np.uint8)
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        cells = 2 + number % 5
        corners = generator.uniform(0, 255, (cells + 1, cells + 1, 3)).astype(np.float32)
        picture = _between(corners, y * cells, x * cells)
        radius, (centre_y, centre_x) = generator.uniform(0.1, 0.4), generator.uniform(0.2, 0.8, 2)
        distance = np.abs(y - centre_y) + np.abs(x - centre_x) if number % 2 else np.hypot(y - centre_y, x - centre_x)
        picture[distance < radius] = generator.uniform(0, 255, 3)
        noise = generator.normal(0, generator.uniform(2, 24), picture.shape)
        pictures[number] = np.clip(picture + noise, 0, 255)
    return pictures


def _between(corners: Float32, y: Float32, x: Float32) -> Float32:
    """Bilinear values of a grid of colours at float positions (H, W)."""
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[..., None], (x - left)[..., None]
    upper = corners[top, left] * (1 - right) + corners[top, left + 1] * right
    lower = corners[top + 1, left] * (1 - right) + corners[top + 1, left + 1] * right
    return np.asarray(upper * (1 - down) + lower * down, np.float32)
