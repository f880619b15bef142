"""Put data, codecs, models and samplers together: from flags when a run begins, from headers when one is taken up.

Pixels and latents are one path. A run works in a `Space`: a codec between pictures and latents (`PixelCodec`, or an
autoencoder) and the normalizer between latents and the x0 that networks see. Headers carry it, and models are combined
only where their spaces agree.
"""

import dataclasses
import functools
import inspect
import json
from pathlib import Path

import numpy as np
import torch

from . import checkpoint_util, dist_util, export, logger, metrics
from .autoencoder import create_autoencoder
from .config import as_dict, from_dict, frozen, size
from .discriminator import create_discriminator
from .files import sha256_of_file
from .gaussian_diffusion import DiffusionConfig
from .guidance import ClassifierFree, classifier_gradient, parse_interval, times_between
from .image_datasets import BatchPlan, labels_in, parse_size, picture_batches, require_labels
from .latent_datasets import MANIFEST, EncodedPictures, LatentStream, ShrunkPictures, open_latents
from .perceptual import PerceptualLoss
from .previews import ClassifierValidation, ReconstructionPreview, SamplePreview
from .resample import create_named_schedule_sampler
from .sampling import Sampler, SmallPictures, draw, open_npz, parse_classes, solver_of
from .script_util import (
    NUM_CLASSES, RunConfig, create_classifier_and_diffusion, create_gaussian_diffusion, create_model_and_diffusion_vae,
    end_run, print_model_size, say, write_config,
)
from .train_util import (
    Adversary, AutoencoderObjective, ClassifierObjective, DiffusionObjective, TrainLoop, progress_bar, seed_weights,
    settled,
)
from .unet import ClassifierConfig, ModelConfig, SuperResConfig
from .vae_wrapper import LatentNormalizer, PixelCodec, check_latent_std, create_vae
from .volume_datasets import open_folder

# What a sampler may choose freely: everything else in the header of a model describes the weights.
FREE_AT_SAMPLING = ("timestep_respacing", "use_fp16", "use_checkpoint", "dropout", "classifier_use_fp16")


@dataclasses.dataclass
class Space:
    """Where x0 lives. `codec` is None where a cache is trained on and its autoencoder is not at hand."""

    codec: object
    normalizer: LatentNormalizer

    @property
    def is_pixels(self):
        return isinstance(self.codec, PixelCodec)

    def encode(self, images):
        """Return x0 of pictures in [0, 1].  [N x C x ...] -> [N x Z x ...]."""
        return self.normalizer.normalise(self.codec.encode_batch(images))


# ---------------------------------------------------------------------------------------------------------------------
# data


def open_data(latents, vae, scale, data, given, seed, folder=None):
    """Return (source, Space) of what a run trains on.

    A cache (`--cache_dir`); pictures that an autoencoder encodes as they come (`--vae_path`); without either, the
    pictures themselves.
    """
    if latents.cache_dir or vae.vae_path:
        source, codec = open_latent_source(latents, vae, data, given, seed, folder)
        return source, Space(codec, fit_normalizer(scale, source))
    return open_pixels(open_folder(data))


def open_pixels(pictures):
    """Return (source, Space) of pictures that are x0 themselves, in [-1, 1]."""
    codec = PixelCodec(pictures.shape[0], dims=len(pictures.shape) - 1)
    return EncodedPictures(pictures, codec, dist_util.dev()), Space(codec, LatentNormalizer([0], [1], "none"))


def open_latent_source(latents, vae, data, given, seed, folder=None):
    """Return (latent source, codec or None): a cache, or pictures that an autoencoder encodes on the fly.

    A cache needs no autoencoder to train from; without one there are no previews. A run that goes on in `folder` keeps
    the statistics it began with.
    """
    device = dist_util.dev()
    if bool(latents.cache_dir) == bool(data.data_dir):
        raise ValueError(f"--cache_dir is {latents.cache_dir!r} and --data_dir is {data.data_dir!r}; give one of them: "
                         "a cache of latents, or pictures together with --vae_path")
    if latents.cache_dir:
        source = open_cache(latents.cache_dir, given)
        codec = codec_of(source.autoencoder, vae, device, required=False)
        if codec is None:
            say("the cache's autoencoder is not at hand (--vae_path), so there are no previews")
        return source, codec
    codec = create_vae(vae, device)
    pictures = open_pictures(data, given, codec)
    encoded = functools.partial(EncodedPictures, pictures, codec, device, latents.stats_samples, seed)
    measured = begun_with(folder).get("statistics")
    if dist_util.rank() == 0 and measured is None:
        with progress_bar(None, 0, "measuring latents") as bar:
            measured = encoded(progress=bar.advance_to).statistics
    return encoded(statistics=dist_util.broadcast_object(measured)), codec


def open_cache(folder, given):
    """Return a cache that was verified, on the device where it fits, and does not contradict the flags of the data."""
    source = open_latents(folder)
    require_same_pictures(source, given)
    verify(source)
    device = dist_util.dev()
    if device.type == "cuda":
        source.on_device(device, torch.cuda.mem_get_info()[0] // 4)
    return source


def open_held_out(path, space, data, given):
    """Return the source of held-out data in the `Space` of a run: a cache of the same autoencoder, or pictures."""
    if (Path(path) / MANIFEST).exists():
        cache = open_latents(path)
        same = space.codec is None or cache.autoencoder["sha256"] == space.codec.fingerprint
        if space.is_pixels or not same:
            raise ValueError(f"{path} is a cache of autoencoder {cache.autoencoder['path']}, which this run does not "
                             "train on; give pictures as --val_data_dir, or a cache of the same autoencoder")
        return cache
    if space.codec is None:
        raise FileNotFoundError(f"{path} holds pictures, and the autoencoder of the cache is not at hand to encode "
                                "them; set --vae_path, or give a cache as --val_data_dir")
    pictures = open_pictures(dataclasses.replace(data, data_dir=path, random_flip=False), given, space.codec)
    return EncodedPictures(pictures, space.codec, dist_util.dev(), statistics={})


def open_pictures(data, given, codec):
    """Return the pictures or volumes that a codec shall see, read as it was trained where the flags do not say."""
    return open_folder(as_trained(data, given, codec.preprocessing), multiple=codec.factors)


def open_small(source, space, small_size, small_cache, given):
    """Return the source of the small pictures that go with `source`, item by item.

    :raises ValueError: where they are not smaller, or a cache of small ones does not go with that of the large ones.
    """
    if small_cache:
        small = open_cache(small_cache, given)
        if getattr(small, "filenames", 0) != getattr(source, "filenames", 1):
            raise ValueError(f"{small_cache} holds other pictures, or in another order, than {source.folder}; encode "
                             "the same folder twice, with two --image_size")
        if small.autoencoder != source.autoencoder:
            raise ValueError(f"{small_cache} and {source.folder} were made by different autoencoders, "
                             f"{small.autoencoder['path']} and {source.autoencoder['path']}")
    elif isinstance(source, EncodedPictures):
        sides = parse_size(small_size)
        small = EncodedPictures(ShrunkPictures(source.pictures, sides), space.codec, dist_util.dev(), statistics={})
    else:
        raise ValueError(f"{source.folder} is a cache; give that of the small pictures as --small_cache_dir")
    if any(a >= b for a, b in zip(small.latent_shape[1:], source.latent_shape[1:])):
        raise ValueError(f"small pictures give x0 of shape {small.latent_shape}, large ones of {source.latent_shape}; "
                         "--small_size must be below --large_size")
    return small


def with_sizes(super_res, source, small, given):
    """Return a SuperResConfig with the sizes of the pictures of the two sources, which flags must not contradict."""
    found = {}
    for name, of in (("large_size", source), ("small_size", small)):
        if of.unpadded_shape:
            found[name] = size("x".join(map(str, of.unpadded_shape[1:])))
            if given.get(name, found[name]) != found[name]:
                raise ValueError(f"--{name} {given[name]}, but the pictures of {of.folder} are {found[name]}; leave "
                                 "the flag away or encode again")
    return dataclasses.replace(super_res, **found)


def as_trained(data, given, preprocessing):
    """Return a DataConfig with the settings that a model was trained with, but for those that are given."""
    known = {f.name for f in dataclasses.fields(data)} - {"data_dir", "random_flip"} - set(given)
    if "voxel_size" in given:
        known -= {"image_size"}
    return dataclasses.replace(data, **{k: frozen(v) for k, v in preprocessing.items() if k in known})


def require_same_pictures(cache, given):
    """Refuse flags of the data that contradict how the pictures of a cache were read."""
    read = cache.preprocessing
    for key, value in given.items():
        if key in read and frozen(read[key]) != value:
            raise ValueError(f"--{key} {value} contradicts the cache {cache.folder}, whose pictures were read with "
                             f"{key} {read[key]}; leave the flag away or encode again")


def verify(cache, limit_bytes=2**32):
    """Compare a cache with the SHA-256 of its files on rank 0, where that takes seconds."""
    if dist_util.rank() == 0 and hasattr(cache, "verify"):
        if cache.nbytes > limit_bytes:
            return say(f"{cache.folder} is large and taken as it is; encode_dataset.py with the same flags verifies it")
        with progress_bar(None, 0, "verifying the cache") as bar:
            cache.verify(bar.advance_to)


def say_source(source):
    """Print what a source holds: count, shape, classes, and for latents their statistics."""
    classes = spread = ""
    if source.class_names:
        counts = np.bincount(source.labels, minlength=len(source.class_names))
        classes = "; classes: " + ", ".join(f"{name} {n}" for name, n in zip(source.class_names, counts))
    if source.statistics:
        of = source.statistics
        by_channel = ", ".join(f"{std:.4f}" for std in of["channel_std"])
        spread = f"; mean {of['mean']:.4f}, std {of['std']:.4f}, std per channel {by_channel}"
    what = "latents" if source.statistics else "pictures"
    say(f"{source.count} {what} {'x'.join(map(str, source.latent_shape))} in {source.folder}{classes}{spread}")


def begun_with(folder):
    """Return the header of the run that goes on in `folder`, an empty dictionary where none does."""
    if not folder or not checkpoint_util.steps(folder):
        return {}
    try:
        return json.loads((Path(folder) / "config.json").read_text())["header"]
    except (OSError, ValueError, KeyError):
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# spaces


def codec_of(described, vae, device, required=True):
    """Open the codec that x0 was made with: for latents `--vae_path`, else where the description says that it was.

    :raises ValueError: where another autoencoder is found, naming both.
    :raises FileNotFoundError: where none is found, unless `required` is False; then None is returned.
    """
    if described and described["config"].get("class") == "PixelCodec":
        return PixelCodec(described["config"]["channels"], described["config"]["dims"])
    described = described or {"path": "", "sha256": None, "scale_factor": vae.scale_factor or None}
    path = vae.vae_path or described["path"]
    if not path or not vae.vae_path and not path.startswith("hub:") and not Path(path).exists():
        if required:
            raise FileNotFoundError(f"the autoencoder is no longer at {path or 'any known place'}; say with --vae_path "
                                    "where it is")
        return None
    scale_factor = vae.scale_factor or described["scale_factor"]
    codec = create_vae(dataclasses.replace(vae, vae_path=path, scale_factor=scale_factor or 0.0), device)
    stale = not required and not vae.vae_path and codec.fingerprint != described["sha256"]
    if stale:
        say(f"{path} no longer holds the autoencoder {_short(described['sha256'])} that the latents were made with")
        return None
    for name, wanted, found in (("autoencoder", described["sha256"], codec.fingerprint),
                                ("scale_factor", described["scale_factor"], codec.scale_factor)):
        if wanted is not None and wanted != found:
            raise ValueError(f"the latents were made with {name} {_short(wanted)} ({described['path']}), {path} has "
                             f"{_short(found)}; give the autoencoder they were made with as --vae_path")
    return codec


def _short(value):
    return value[:16] if isinstance(value, str) else value


def space_of(header, vae, device):
    """Open the `Space` that a header describes."""
    return Space(codec_of(header["autoencoder"], vae, device), LatentNormalizer.from_dict(header["normalizer"]))


def fit_normalizer(config, source):
    """Return the LatentNormalizer of a latent source, after checking what it makes of the measured deviation."""
    normalizer = LatentNormalizer.fit(config.normalizer, source.statistics, source.scale_factor)
    std = source.statistics["std"] / normalizer.std[0] if len(normalizer.std) == 1 else 1.0
    check_latent_std(std, normalizer, config.allow_latent_std)
    return normalizer


def require_same_space(mine, other, path, flag):
    """Refuse a model whose x0 are not those of the first one; both are given by their headers."""
    ways = {"autoencoder": lambda h: h["autoencoder"] and h["autoencoder"]["sha256"],
            "normalizer": lambda h: (h["normalizer"]["shift"], h["normalizer"]["std"]),
            "shape of x0": lambda h: h["latent_shape"]}
    for what, read in ways.items():
        if read(mine) != read(other):
            places = [_short(read(h)) for h in (mine, other)]
            raise ValueError(f"{path} ({flag}) works on x0 of {what} {places[1]}, the diffusion model on {places[0]}; "
                             "train it on the same pictures, cache or autoencoder")


def space_header(source, space):
    """Return what headers say of the x0 of a run.

    A plain folder of latents does not know its autoencoder; then the one given as `--vae_path` is taken for it.
    """
    autoencoder = source.autoencoder or (space.codec and space.codec.describe())
    return {
        "latent_shape": list(source.latent_shape), "image_shape": source.unpadded_shape and list(source.unpadded_shape),
        "normalizer": space.normalizer.to_dict(), "autoencoder": autoencoder,
        "scale_factor": autoencoder["scale_factor"] if autoencoder else source.scale_factor,
        "statistics": source.statistics, "data": source.preprocessing,
    }


# ---------------------------------------------------------------------------------------------------------------------
# training


def train_diffusion(script, run, folder, configs, source, space, model_flags, process, train, super_res=None,
                    small=None):
    """Train a UNet, or with a `SuperResConfig` and the source of small pictures an upsampler, and save it in `folder`.

    With `run.dry_run` the model's size is printed and nothing is trained.
    """
    say_source(source)
    train = settled(train)
    model_flags = with_classes(model_flags, source)
    seed_weights(train.seed)
    model, diffusion = create_model_and_diffusion_vae(
        source.latent_shape, model_flags, process, super_res, discrete_data=space.is_pixels
    )
    plan = BatchPlan(source.count, train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    say(plan.summary())
    if run.dry_run:
        return print_model_size(model, one_sample(source.latent_shape, model_flags, small), train.batch_size)

    header = diffusion_header(source, space, model_flags, process, super_res)
    device = dist_util.dev()
    model.to(device)
    preview = None
    if space.codec is not None and super_res is None:
        preview = SamplePreview(preview_sampler(model, space.codec, header), folder, device)
    objective = DiffusionObjective(
        diffusion, create_named_schedule_sampler(train.schedule_sampler, diffusion),
        model_flags.class_dropout, model_flags.num_classes, super_res.cond_noise_steps if super_res else 0,
    )
    loop = TrainLoop(
        model=model, objective=objective, header=header, use_fp16=model_flags.use_fp16, preview=preview,
        data=LatentStream(source, space.normalizer, plan, train.seed, device, model_flags.class_cond, small),
        **loop_arguments(train, "schedule_sampler"),
    )
    write_config(folder, script, configs, header)
    loop.run_loop()


def diffusion_header(source, space, model, process, super_res=None):
    """Return what the checkpoints of a diffusion model, or of an upsampler, say about themselves."""
    header = {"kind": "super_res" if super_res else "diffusion", "model": as_dict(model), "diffusion": as_dict(process),
              "classes": source.class_names if model.class_cond else None, **space_header(source, space)}
    return {**header, "super_res": as_dict(super_res)} if super_res else header


def train_autoencoder(run, folder, configs, data, autoencoder, loss, rival, perceptual, train):
    """Train a KL autoencoder and save it in `folder`; with `run.dry_run` print its size alone.

    :param rival: a DiscriminatorConfig; `perceptual`: a PerceptualConfig; both may say that there is none.
    """
    train = settled(train)
    if train.use_gradient_checkpointing:
        autoencoder = dataclasses.replace(autoencoder, use_checkpointing=True)
    autoencoder = dataclasses.replace(autoencoder, spatial_dims=len(data.sides))
    factors = create_autoencoder(dataclasses.replace(autoencoder, in_channels=autoencoder.in_channels or 1)).factors
    pictures = open_folder(data, multiple=factors)
    autoencoder = dataclasses.replace(autoencoder, in_channels=autoencoder.in_channels or pictures.shape[0])
    seed_weights(train.seed)
    network = create_autoencoder(autoencoder)
    latent_shape = network.latent_shape(pictures.shape[1:])
    say(pictures.summary())
    say(f"total downsampling {network.factors}: pictures {pictures.shape} -> latents {latent_shape}")
    plan = BatchPlan(len(pictures), train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    say(plan.summary())
    if run.dry_run:
        return print_model_size(network, lambda m: m(torch.zeros(1, *pictures.shape))[0], train.batch_size)

    device = dist_util.dev()
    network.to(device)
    adversary = distance = None
    if rival.discriminator_weight:
        judge = create_discriminator(rival, autoencoder.spatial_dims, pictures.shape[0]).to(device)
        adversary = Adversary(judge, rival, train.lr)
    if perceptual.use_perceptual_loss:
        distance = PerceptualLoss(perceptual, autoencoder.image_range).to(device)
    objective = AutoencoderObjective(loss, network, autoencoder.image_range, train.mirror,
                                     distance and (perceptual.perceptual_weight, distance), adversary)
    header = {"kind": "autoencoder", "autoencoder": as_dict(autoencoder), "image_shape": list(pictures.shape),
              "data": pictures.preprocessing}
    held_out = pictures
    if train.val_data_dir:
        held_out = open_folder(dataclasses.replace(data, data_dir=train.val_data_dir, random_flip=False), factors)
    preview = ReconstructionPreview(network, autoencoder.image_range, held_out, train.val_pictures, folder, device)
    bounds = {"val_psnr": train.stop_at_psnr, "val_l1": train.stop_at_l1}
    loop = TrainLoop(
        model=network, data=picture_batches(pictures, plan), header=header, preview=preview, objective=objective,
        best_by="val_psnr", stop_at={name: bound for name, bound in bounds.items() if bound}, **loop_arguments(train),
    )
    write_config(folder, "train_autoencoder", configs, header)
    loop.run_loop()


def train_classifier(run, folder, configs, given, source, space, data, flags, process, train):
    """Train a classifier of the x0 of `source` and save it in `folder`; with `run.dry_run` print its size alone."""
    say_source(source)
    flags = classifier_for(flags, source)
    seed_weights(train.seed)
    model, diffusion = build_classifier(flags, process, source.latent_shape)
    plan = BatchPlan(source.count, train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    say(plan.summary())
    if run.dry_run:
        one = lambda network: network(torch.zeros(1, *source.latent_shape), torch.zeros(1, dtype=torch.long))
        return print_model_size(model, one, train.batch_size)

    header = {"kind": "classifier", "model": as_dict(flags), "diffusion": as_dict(process), "noised": train.noised,
              "classes": source.class_names, **space_header(source, space)}
    device = dist_util.dev()
    model.to(device)
    times = create_named_schedule_sampler(train.schedule_sampler, diffusion)
    validation = None
    if train.val_data_dir:
        validation = ClassifierValidation(
            model, ClassifierObjective(diffusion, times, train.noised, "val"),
            open_held_out(train.val_data_dir, space, data, given), space.normalizer, source.class_names,
            train.val_pictures, train.batch_size, train.eval_interval, train.seed, device,
        )
    loop = TrainLoop(
        model=model, objective=ClassifierObjective(diffusion, times, train.noised), header=header,
        data=LatentStream(source, space.normalizer, plan, train.seed, device, with_labels=True),
        preview=validation, preview_interval=train.eval_interval, max_steps=train.iterations, ema_rate="",
        lr_anneal_steps=train.iterations if train.anneal_lr else 0, use_fp16=flags.classifier_use_fp16,
        **loop_arguments(train, "schedule_sampler"),
    )
    write_config(folder, "classifier_train", configs, header)
    loop.run_loop()


def open_extractors(config, vae, data, given):
    """Return (extract, judge, header, data) for `evaluation.evaluate`: what measures pictures, and how they are read.

    `judge` is the classifier of `--classifier_path` or None; `header` says which pictures and classes it knows.
    """
    device = dist_util.dev()
    header, judge = {"classes": None, "image_shape": None, "data": {}}, None
    if config.classifier_path:
        classifier, header = load_classifier(config.classifier_path, device)
        space = space_of(header, vae, device)
        prepare = None if space.is_pixels else lambda images: space.encode(images.to(device))
        judge = metrics.classifier_features(classifier, prepare)
    if config.inception_path:
        extract = metrics.inception_features(config.inception_path, device)
    elif judge:
        extract = judge
    else:
        codec = create_vae(vae, device)
        extract, header = metrics.latent_features(codec), {**header, "data": codec.preprocessing}
    return extract, judge, header, as_trained(data, given, header["data"])


def train_on_samples(config, data, given, flags, process, train, folder):
    """Train a classifier on samples, and one on the training pictures; return what share of real pictures they tell.

    The accuracy of the first, beside that of the second, says how much of what tells classes apart the samples have.
    Each run stands in its own folder below `folder`.
    """
    read = lambda path: open_folder(data, data_dir=str(path))
    real, report = read(config.reference), {}
    for name, path in (("samples", config.samples), ("training", config.train_dir)):
        if not path:
            continue
        place = Path(folder) / f"trained_on_{name}"
        source, space = open_pixels(read(path))
        once = dataclasses.replace(train, iterations=config.tstr_iterations, noised=False, val_data_dir="",
                                   save_interval=config.tstr_iterations)
        with logger.scoped_configure(str(place), ["log", "csv"]):
            train_classifier(RunConfig(str(place)), place, (), given, source, space, data, flags, process, once)
        model, header = load_classifier(str(place), dist_util.dev())
        extract = metrics.classifier_features(model)
        starts = range(0, len(real), config.batch_size)
        batches = (real.batch(range(start, min(start + config.batch_size, len(real)))) for start in starts)
        predicted = metrics.collect_features(extract, batches).logits.argmax(1)
        judged = metrics.classification_report(predicted, labels_in(real, header["classes"]), header["classes"])
        report[f"train_on_{name}_test_on_real"] = judged
    return report


def one_sample(shape, model, small=None):
    """Return what `print_model_size` calls: the UNet on one x0 [C x ...]."""
    told = {"y": torch.zeros(1, dtype=torch.long, device="meta")} if model.class_cond else {}
    if small is not None:
        told["low_res"] = torch.zeros(1, *small.latent_shape, device="meta")
    return lambda network: network(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long), **told)


def loop_arguments(train, *without):
    """Return the fields of a training config that TrainLoop takes, but for those named."""
    return {k: v for k, v in vars(train).items() if k in inspect.signature(TrainLoop).parameters and k not in without}


def with_classes(model, source):
    """Return a ModelConfig with the classes, channels and axes of the data, which flags must not contradict."""
    classes = len(source.class_names) if source.class_names else 0
    if model.class_cond and not classes:
        raise ValueError(f"--class_cond True, but {source.folder} has no classes: name the files <class>_<rest>.png, "
                         "or put each class into a folder of its own (and encode again)")
    found = {"in_channels": source.latent_shape[0], "dims": len(source.latent_shape) - 1}
    return _from_data(model, {**found, "num_classes": classes if model.class_cond else 0}, source.folder)


def classifier_for(flags, source):
    """Return a ClassifierConfig with the channels, axes and number of classes of the data."""
    if not source.class_names:
        raise ValueError(f"{source.folder} has no classes: name the files <class>_<rest>.png, or put each class into a "
                         "folder of its own")
    found = {"classifier_in_channels": source.latent_shape[0], "classifier_num_classes": len(source.class_names),
             "classifier_dims": len(source.latent_shape) - 1}
    return _from_data(flags, found, source.folder)


def _from_data(config, found, folder):
    """Return a config with what was found in the data; a flag that says otherwise is refused."""
    for name, value in found.items():
        if getattr(config, name) not in (0, value):
            raise ValueError(f"--{name} {getattr(config, name)}, but {folder} has {value}; leave the flag away")
    return dataclasses.replace(config, **found)


def build_classifier(flags, process, shape):
    """Build the classifier of x0 [C x ...] and the process that noises them."""
    sides = shape[1] if len(set(shape[1:])) == 1 else tuple(shape[1:])
    return create_classifier_and_diffusion(image_size=sides, **as_dict(flags), **as_dict(process))


def preview_sampler(model, codec, header):
    """Return a Sampler for previews: the model in training, walked through in about 50 evenly spaced steps.

    The spacing of DDIM begins below the very last step, where latents are all but pure noise and an unclipped
    prediction of x0 from an unfinished model runs away.
    """
    steps = header["diffusion"]["diffusion_steps"]
    spaced = len(range(0, steps, -(-steps // 50)))
    diffusion = process_of({**header["diffusion"], "timestep_respacing": f"ddim{spaced}"})
    return sampler_from(model, diffusion, Space(codec, LatentNormalizer.from_dict(header["normalizer"])), header)


def process_of(flags):
    """Build the process that the "diffusion" flags of a header describe."""
    return create_gaussian_diffusion(steps=flags["diffusion_steps"],
                                     **{key: value for key, value in flags.items() if key != "diffusion_steps"})


# ---------------------------------------------------------------------------------------------------------------------
# models from their checkpoints


def load_diffusion_model(path, given, model, process, shape=None, super_res=None, pixels=False, flag="--model_path"):
    """Rebuild a diffusion model or an upsampler from its weights file; return (model, diffusion, header).

    The header describes the model; `given` flags that contradict it are refused, those of FREE_AT_SAMPLING win over it.
    Weights without a header, such as a released checkpoint, are described by the flags alone: the two configs, the
    `shape` of x0 [C x ...], a SuperResConfig for an upsampler, and whether x0 are `pixels`.
    """
    weights, header = checkpoint_util.load_weights(path, "cpu", flag)
    if header is not None:
        checkpoint_util.require_kind(header, "super_res" if super_res else "diffusion", path, flag)
        described = described_by(header, given, path, ("model", "diffusion", "super_res"))
        model, process = from_dict(ModelConfig, described), from_dict(DiffusionConfig, described)
        super_res = super_res and from_dict(SuperResConfig, described)
        shape = header["latent_shape"]
        pixels = works_on_pixels(header)
    network, diffusion = create_model_and_diffusion_vae(tuple(shape), model, process, super_res, discrete_data=pixels)
    checkpoint_util.load_into(network, weights, path, flag)
    network.to(dist_util.dev())
    if model.use_fp16:
        network.convert_to_fp16()
    return network.eval(), diffusion, header


def described_by(header, given, path, sections):
    """Return the flags of a header's sections; `given` ones that contradict it are refused or, if free, win."""
    described = {key: value for section in sections for key, value in header.get(section, {}).items()}
    for key, value in given.items():
        if key in described and key not in FREE_AT_SAMPLING and frozen(described[key]) != value:
            raise ValueError(f"--{key} {value} contradicts {path}, which was trained with {key} {described[key]}; "
                             "leave the flag away")
    return {**described, **{key: given[key] for key in FREE_AT_SAMPLING if key in given}}


def works_on_pixels(header):
    """Say whether the x0 of a header's model are pictures."""
    return bool(header["autoencoder"]) and header["autoencoder"]["config"].get("class") == "PixelCodec"


def load_sampler(config, given, model, process, data, vae, scale=None, guidance=None, classifier=None, super_res=None):
    """Return the Sampler that the configs of a sampling script describe.

    `scale` is there where a model without a header works on latents; without it such a model works on pixels.
    `guidance` and `classifier` (their configs) are there where a classifier guides, `super_res` (a BaseConfig and a
    SuperResConfig) for an upsampler.
    """
    base, super_res = super_res or (None, None)
    path = weights_file(config.model_path, "--model_path")
    if is_described(path):
        network, diffusion, header = load_diffusion_model(path, given, model, process, super_res=super_res)
        space = space_of(header, vae, dist_util.dev())
    else:
        space = _space_of_flags(path, scale, data, vae)
        header = _header_of_flags(space, model, process, data, super_res)
        network, diffusion, _ = load_diffusion_model(
            path, given, model, process, header["latent_shape"], super_res, space.is_pixels
        )
    sampler = sampler_from(network, diffusion, space, header)
    _require_described(sampler, given, scale, data, path)
    sampler.solver, sampler.seed = solver_of(config), config.seed
    sampler.made_from["model"] = _digest_on_rank_0(path)
    if "clip_denoised" in given:
        sampler.clip_denoised = config.clip_denoised
    if config.cfg_scale != 1:
        _guide_free(sampler, config, header, path)
    elif config.cfg_interval:
        raise ValueError(f"--cfg_interval {config.cfg_interval} bounds a guidance that --cfg_scale 1 does not do")
    if guidance is not None:
        _guide_by_classifier(sampler, guidance, classifier, process, given, header)
    if super_res is not None:
        sampler.small = open_base(base, sampler, from_dict(SuperResConfig, header["super_res"]), header["diffusion"])
        sampler.made_from.update(base=base.base_samples, cond_noise_level=base.cond_noise_level)
    return sampler


def _digest_on_rank_0(path):
    """Return the SHA-256 of a file where samplings are compared with it, on rank 0; reading it once is enough."""
    return sha256_of_file(path) if dist_util.rank() == 0 else None


def _space_of_flags(path, scale, data, vae):
    """Return the Space of a bare state dict, which only flags can tell."""
    if scale is None:
        return Space(PixelCodec(data.image_channels or 3), LatentNormalizer([0], [1], "none"))
    if scale.normalizer in ("auto", "channel"):
        raise ValueError(f"{path} is a bare state dict and brings no statistics for --normalizer {scale.normalizer}; "
                         "give the number that its latents were divided by, or none")
    codec = create_vae(vae, dist_util.dev())
    return Space(codec, LatentNormalizer.fit(scale.normalizer, None, codec.scale_factor))


def _header_of_flags(space, model, process, data, super_res):
    """Return what the header of a bare state dict would say."""
    sides = parse_size(super_res.large_size if super_res else data.image_size)
    shape = [data.image_channels or space.codec.in_channels, *sides]
    classes = (model.num_classes or NUM_CLASSES) if model.class_cond else 0
    return {"model": {**as_dict(model), "num_classes": classes}, "diffusion": as_dict(process), "classes": None,
            "super_res": super_res and as_dict(super_res), "latent_shape": list(space.codec.latent_shape(shape)),
            "image_shape": shape, "normalizer": space.normalizer.to_dict(), "autoencoder": space.codec.describe()}


def _require_described(sampler, given, scale, data, path):
    """Refuse flags of the space and the pictures that contradict the model; those of the model itself are done with."""
    channels, *sides = sampler.image_shape
    found = {"image_size": size("x".join(map(str, sides))), "image_channels": channels}
    asked = {**vars(data), **({} if scale is None else vars(scale))}
    for flag, value in {**found, "normalizer": sampler.normalizer.mode}.items():
        if flag in given and asked[flag] not in (0, value):
            raise ValueError(f"--{flag} {asked[flag]} contradicts {path}, which was trained with {flag} {value}; leave "
                             "the flag away")


def _guide_free(sampler, config, header, path):
    if not header["model"].get("class_dropout"):
        raise ValueError(f"--cfg_scale {config.cfg_scale} needs a model that was trained with --class_dropout above 0; "
                         f"{path} was not, so it knows nothing of data without classes")
    interval = parse_interval(config.cfg_interval)
    times = times_between(sampler.diffusion, interval) if interval else None
    if interval and times is None:
        raise ValueError(f"--cfg_interval {config.cfg_interval}: none of the {sampler.diffusion.num_timesteps} steps "
                         "has a noise level inside; widen it")
    sampler.model = ClassifierFree(sampler.model, sampler.num_classes, config.cfg_scale, times)
    sampler.made_from.update(cfg_scale=config.cfg_scale, cfg_interval=config.cfg_interval)


def _guide_by_classifier(sampler, guidance, classifier, process, given, header):
    if not guidance.classifier_path:
        raise FileNotFoundError("no classifier given; --classifier_path wants a run of classifier_train.py, or one "
                                "weights file of it")
    path = weights_file(guidance.classifier_path, "--classifier_path")
    network, described = load_classifier(path, dist_util.dev(), given, classifier, process, sampler.shape)
    if described["noised"] is False:
        raise ValueError(f"{path} was trained on clean data (--noised False) and cannot read noisy x0; train another "
                         "with --noised True")
    if "autoencoder" in described:
        require_same_space(header, described, path, "--classifier_path")
        _require_same_noise(header["diffusion"], described["diffusion"], path)
    names = described["classes"], sampler.class_names
    if all(names) and names[0] != names[1]:
        raise ValueError(f"{path} knows the classes {', '.join(names[0])}, the diffusion model {', '.join(names[1])}")
    sampler.class_names = sampler.class_names or described["classes"]
    sampler.guided_classes = network.out_channels
    sampler.cond_fn = classifier_gradient(network, guidance.classifier_scale)
    sampler.made_from.update(classifier=_digest_on_rank_0(path), classifier_scale=guidance.classifier_scale)


def _require_same_noise(model, classifier, path):
    for flag in ("diffusion_steps", "noise_schedule", "rescale_timesteps"):
        if model[flag] != classifier[flag]:
            raise ValueError(f"{path} was trained with --{flag} {classifier[flag]}, the diffusion model with "
                             f"{model[flag]}: the same time would mean another noise to each; train the classifier "
                             "with the diffusion model's")


def open_base(base, sampler, super_res, process):
    """Return the `SmallPictures` that `--base_samples` holds, after comparing them with the upsampler."""
    if not base.base_samples:
        raise FileNotFoundError("no small pictures given; --base_samples wants an .npz of samples")
    samples = open_npz(base.base_samples)
    channels, sides = samples.images.shape[-1], samples.images.shape[1:-1]
    wanted = (sampler.image_shape[0], *parse_size(super_res.small_size))
    if (channels, *sides) != wanted:
        raise ValueError(f"{base.base_samples} holds pictures of shape {(channels, *sides)}, the upsampler was trained "
                         f"on {wanted} (channels, sides); give another --base_samples")
    if sampler.num_classes and samples.labels is None:
        raise ValueError(f"{base.base_samples} has no labels (arr_1), which this upsampler wants; sample the small "
                         "pictures with a model that has classes")
    if not 0 <= base.cond_noise_level <= max(super_res.cond_noise_steps - 1, 0):
        raise ValueError(f"--cond_noise_level {base.cond_noise_level}: the upsampler was trained with "
                         f"--cond_noise_steps {super_res.cond_noise_steps}, so levels from 0 to below that can be had")
    images = np.moveaxis(samples.images, -1, 1)
    whole = process_of({**process, "timestep_respacing": ""})
    return SmallPictures(images, samples.labels if sampler.num_classes else None, sampler.codec, sampler.normalizer,
                         whole, base.cond_noise_level, sampler.seed)


def sampler_from(model, diffusion, space, header):
    """Return the Sampler of a model that its header describes."""
    shape = tuple(header["latent_shape"])
    image_shape = header["image_shape"]
    if not image_shape:
        image_shape = space.codec.in_channels, *(n * f for n, f in zip(shape[1:], space.codec.factors))
    sampler = Sampler(model, diffusion, shape, space.codec, space.normalizer, tuple(image_shape),
                      header["model"]["num_classes"], header["classes"])
    if len(image_shape) == 4 and (header.get("data") or {}).get("spacing"):
        sampler.spacing = tuple(float(s) for s in header["data"]["spacing"].split(","))
    return sampler


def load_with_data(config, given, model, process, data, latents, vae):
    """Return (network, diffusion, source, Space, labels or None): a diffusion model, and held-out data as it sees them.

    The data are a cache or pictures, in the space that the model's header names; a model without a header works on
    pixels. Labels are numbered as the model's classes are, and None where it has none.
    """
    device = dist_util.dev()
    path = weights_file(config.model_path, "--model_path")
    if is_described(path):
        network, diffusion, header = load_diffusion_model(path, given, model, process)
        data = as_trained(data, given, header["data"])
        if works_on_pixels(header) or data.data_dir:
            space = space_of(header, vae, device)
            pictures = open_folder(data, multiple=space.codec.factors)
            source = EncodedPictures(pictures, space.codec, device, statistics={})
        else:
            space = Space(None, LatentNormalizer.from_dict(header["normalizer"]))
            source = open_cache(latents.cache_dir, given)
        require_same_space(header, {**header, **space_header(source, space)}, source.folder, "the data")
    else:
        pictures = open_folder(data)
        source, space = open_pixels(pictures)
        network, diffusion, header = load_diffusion_model(path, given, model, process, source.latent_shape, pixels=True)
        header = {"classes": source.class_names}
    if not network.num_classes:
        return network, diffusion, source, space, None
    require_labels(source, True)
    return network, diffusion, source, space, labels_in(source, header["classes"])


def weights_file(path, flag):
    """Return the weights file that a flag names: itself, or of a run folder the one to use (see `newest_weights`).

    Rank 0 looks and all ranks take what it found, as the run may go on meanwhile.
    """
    if not path:
        raise FileNotFoundError(f"no model given; {flag} wants a run folder, or a model or ema file")
    if not Path(path).is_dir():
        return path
    newest = checkpoint_util.newest_weights(path, flag) if dist_util.rank() == 0 else None
    newest = dist_util.broadcast_object(newest)
    say(f"{flag} {path}: taking {newest.name}")
    return newest


def is_described(path, flag="--model_path"):
    """Say whether a weights file carries a header."""
    return checkpoint_util.load_weights(path, "meta", flag)[1] is not None


def load_classifier(path, device, given=(), flags=None, process=None, shape=None, flag="--classifier_path"):
    """Rebuild a classifier from its run folder or weights file; return (model, header).

    One without a header, such as a released checkpoint, is described by `flags` (a ClassifierConfig), the process that
    noised its data and the `shape` of x0 [C x ...]; where they are missing it is refused.
    """
    path = weights_file(path, flag)
    weights, header = checkpoint_util.load_weights(path, "cpu", flag)
    if header is not None:
        checkpoint_util.require_kind(header, "classifier", path, flag)
        own = {key: value for key, value in dict(given).items() if key.startswith("classifier_")}
        described = described_by(header, own, path, ("model", "diffusion"))
        flags, process = from_dict(ClassifierConfig, described), from_dict(DiffusionConfig, described)
        shape = header["latent_shape"]
    elif flags is None:
        raise ValueError(f"{path} does not say how it is built; {flag} wants a checkpoint of classifier_train.py")
    else:
        flags = dataclasses.replace(flags, classifier_in_channels=shape[0], classifier_dims=len(shape) - 1)
        header = {"classes": None, "noised": True}
    model, _ = build_classifier(flags, process, shape)
    checkpoint_util.load_into(model, weights, path, flag)
    model.to(device)
    if flags.classifier_use_fp16:
        model.convert_to_fp16()
    return model.eval(), header


def export_model(config, vae):
    """Write a model as ExportConfig says; return what it was made of, for the log.

    :raises ValueError: for a kind of model, or an architecture, that the format has no place for.
    """
    if not config.out:
        raise FileNotFoundError("nowhere to write to; set --out")
    path = weights_file(config.model_path, "--model_path")
    weights, header = checkpoint_util.load_weights(path, "cpu")
    if header is None:
        raise ValueError(f"{path} does not say how it is built; --model_path wants a run or a weights file of this "
                         "project")
    if config.format == "safetensors":
        if not config.out.endswith(".safetensors"):
            raise ValueError(f"--out {config.out}: the file's name ends in .safetensors")
        checkpoint_util.save_safetensors(config.out, weights, header)
        return f"{header['kind']} of {path} with its header"
    if header["kind"] == "autoencoder":
        codec = create_vae(dataclasses.replace(vae, vae_path=str(path)), "cpu")
        export.save_folder(export.codec_to_diffusers(codec), config.out)
        return f"AutoencoderKL of {path}, scaling_factor {codec.scale_factor}"
    checkpoint_util.require_kind(header, "diffusion", path, "--format diffusers")
    network, _, header = load_diffusion_model(path, {}, None, None)
    space = space_of(header, vae, "cpu")
    made = export.pipeline_to_diffusers(network.cpu(), header, space.codec, space.normalizer)
    export.save_folder(made, config.out)
    return f"{type(made).__name__} of {path}"


def sample(sampler, config, folder, run):
    """Draw the samples that a SamplingConfig asks for into `folder`; with `run.dry_run` say what would be drawn."""
    if sampler.small is not None and sampler.small.labels is not None:
        classes = None
        if config.classes:
            raise ValueError(f"--classes {config.classes}: an upsampler takes the classes of its --base_samples")
    else:
        classes = parse_classes(config.classes, sampler.num_classes or sampler.guided_classes, sampler.class_names)
    say(sampler.summary())
    if not run.dry_run:
        path = draw(sampler, classes, config, folder, dist_util.dev())
        say(f"saved {config.num_samples} samples to {path}")
        end_run(folder)
