"""Build models and samplers from checkpoints: their headers describe them, flags may not contradict these.

A bare state dict, such as a released checkpoint, is described by flags alone.
"""

import dataclasses
from pathlib import Path

import numpy as np

from .. import checkpoint_util, dist_util
from ..config import as_dict, from_dict, size, to_tuple
from ..data import DataConfig, map_labels, open_folder, open_npz, parse_size, require_labels
from ..evaluation import features
from ..evaluation.comparison import EvaluateConfig
from ..evaluation.likelihood import LikelihoodConfig
from ..files import sha256_of_file
from ..gaussian_diffusion import DiffusionConfig
from ..latent_datasets import EncodedImages, LatentConfig
from ..logger import log_rank0
from ..sampling.generate import generate_samples
from ..sampling.guidance import (
    ClassifierFreeGuidance, classifier_cond_fn, parse_interval, timesteps_in_interval,
)
from ..sampling.sampler import (
    LowResConditioning, Sampler, SamplingConfig, parse_classes, resolve_sampler,
)
from ..unet import ClassifierConfig, ModelConfig, SuperResConfig
from ..vae_wrapper import LatentNormalizer, PixelCodec, VAEConfig, create_vae
from .factories import NUM_CLASSES, build_classifier, create_model_and_diffusion_vae, create_diffusion
from .spaces import (
    Space, apply_trained_preprocessing, open_cache, open_pixels, open_space, require_same_space, space_header,
    works_on_pixels,
)

# What a sampler may choose freely: everything else in the header of a model describes the weights.
SAMPLING_OVERRIDABLE = ("timestep_respacing", "use_fp16", "use_checkpoint", "recompute_norms", "dropout",
                    "classifier_use_fp16")


def open_extractors(run):
    """Return (extract, judge, header, data) for `evaluation.evaluate`: what measures pictures, and how they are read.

    `judge` is the classifier of `--classifier_path` or None; `header` says which pictures and classes it knows.
    """
    config, vae, device = run[EvaluateConfig], run[VAEConfig], dist_util.dev()
    header, judge = {"classes": None, "image_shape": None, "data": {}}, None
    if config.classifier_path:
        classifier, header = load_classifier(config.classifier_path, device)
        space = open_space(header, vae)
        prepare = None if space.is_pixels else space.encode
        judge = features.classifier_features(classifier, prepare)
    if config.inception_path:
        extract = features.inception_features(config.inception_path, device)
    elif judge:
        extract = judge
    elif not vae.vae_path:
        raise FileNotFoundError("nothing to take features from; give --classifier_path (a run of classifier_train.py), "
                                "--inception_path (for FID), or --vae_path (an autoencoder's latents)")
    else:
        codec = create_vae(vae, device)
        extract, header = features.latent_features(codec), {**header, "data": codec.preprocessing}
    return extract, judge, header, apply_trained_preprocessing(run[DataConfig], run.explicit, header["data"])


def load_diffusion_model(path, given, model, process, shape=None, super_res=None, pixels=False, flag="--model_path"):
    """Rebuild a diffusion model or an upsampler from its weights file; return (model, diffusion, header).

    The header describes the model; `given` flags that contradict it are refused, those of FREE_AT_SAMPLING win over it.
    Weights without a header, such as a released checkpoint, are described by the flags alone: the two configs, the
    `shape` of x0 [C x ...], a SuperResConfig for an upsampler, and whether x0 are `pixels`.
    """
    weights, header = checkpoint_util.load_weights(path, "cpu", flag)
    if header is not None:
        checkpoint_util.require_kind(header, "super_res" if super_res else "diffusion", path, flag)
        described = flags_from_header(header, given, path, ("model", "diffusion", "super_res"))
        model, process = from_dict(ModelConfig, described), from_dict(DiffusionConfig, described)
        super_res = super_res and from_dict(SuperResConfig, described)
        shape = header["latent_shape"]
        pixels = works_on_pixels(header)
    network, diffusion = create_model_and_diffusion_vae(tuple(shape), model, process, super_res, discrete_data=pixels)
    checkpoint_util.load_strict(network, weights, path, flag)
    network.to(dist_util.dev())
    if model.use_fp16:
        network.convert_to_fp16()
    return network.eval(), diffusion, header


def flags_from_header(header, given, path, sections):
    """Return the flags of a header's sections; `given` ones that contradict it are refused or, if free, win."""
    described = {key: value for section in sections for key, value in header.get(section, {}).items()}
    for key, value in given.items():
        if key in described and key not in SAMPLING_OVERRIDABLE and to_tuple(described[key]) != value:
            raise ValueError(f"--{key} {value} contradicts {path}, which was trained with {key} {described[key]}; "
                             "leave the flag away")
    return {**described, **{key: given[key] for key in SAMPLING_OVERRIDABLE if key in given}}


def load_sampler(run, scale=None, guidance=None, base=None):
    """Return the Sampler that a sampling script describes.

    :param scale: a NormalizerConfig, if a model without a header works on latents; without it, it works on pixels.
    :param guidance: a GuidanceConfig, if a classifier guides the model.
    :param base: a BaseConfig, if the model is an upsampler.
    """
    config, given, model, process, data, vae = (
        run[SamplingConfig], run.explicit, run[ModelConfig], run[DiffusionConfig], run[DataConfig], run[VAEConfig]
    )
    classifier = run[ClassifierConfig] if guidance else None
    super_res = run[SuperResConfig] if base else None
    path = resolve_weights(config.model_path, "--model_path")
    if has_header(path):
        network, diffusion, header = load_diffusion_model(path, given, model, process, super_res=super_res)
        space = open_space(header, vae)
    else:
        space = _space_of_flags(path, scale, data, vae)
        header = _header_of_flags(space, model, process, data, super_res)
        network, diffusion, _ = load_diffusion_model(
            path, given, model, process, header["latent_shape"], super_res, space.is_pixels
        )
    sampler = create_sampler(network, diffusion, space, header)
    _require_described(sampler, given, scale, data, path)
    sampler.solver, sampler.seed = resolve_sampler(config), config.seed
    sampler.settings.update(model=_digest_on_rank_0(path), sample_dtype=config.sample_dtype)
    if "clip_denoised" in given:
        sampler.clip_denoised = config.clip_denoised
    if config.sample_dtype == "bfloat16":
        if network.use_fp16:
            raise ValueError("--sample_dtype bfloat16 and --use_fp16 True are two ways to one end; give one of them")
        network.convert_to_bf16()
    if config.cfg_scale != 1:
        _add_classifier_free_guidance(sampler, config, header, path)
    elif config.cfg_interval:
        raise ValueError(f"--cfg_interval {config.cfg_interval} bounds a guidance that --cfg_scale 1 does not do")
    if guidance is not None:
        _guide_by_classifier(sampler, guidance, classifier, process, given, header)
    if super_res is not None:
        sampler.small = open_base_samples(base, sampler, from_dict(SuperResConfig, header["super_res"]), header["diffusion"])
        sampler.settings.update(base=_digest_on_rank_0(base.base_samples), cond_noise_level=base.cond_noise_level)
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


def _add_classifier_free_guidance(sampler, config, header, path):
    if not header["model"].get("class_dropout"):
        raise ValueError(f"--cfg_scale {config.cfg_scale} needs a model that was trained with --class_dropout above 0; "
                         f"{path} was not, so it knows nothing of data without classes")
    interval = parse_interval(config.cfg_interval)
    times = timesteps_in_interval(sampler.diffusion, interval) if interval else None
    if interval and times is None:
        raise ValueError(f"--cfg_interval {config.cfg_interval}: none of the {sampler.diffusion.num_timesteps} steps "
                         "has a noise level inside; widen it")
    sampler.model = ClassifierFreeGuidance(sampler.model, sampler.num_classes, config.cfg_scale, times)
    sampler.settings.update(cfg_scale=config.cfg_scale, cfg_interval=config.cfg_interval)


def _guide_by_classifier(sampler, guidance, classifier, process, given, header):
    if not guidance.classifier_path:
        raise FileNotFoundError("no classifier given; --classifier_path wants a run of classifier_train.py, or one "
                                "weights file of it")
    path = resolve_weights(guidance.classifier_path, "--classifier_path")
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
    sampler.cond_fn = classifier_cond_fn(network, guidance.classifier_scale)
    sampler.settings.update(classifier=_digest_on_rank_0(path), classifier_scale=guidance.classifier_scale)


def _require_same_noise(model, classifier, path):
    for flag in ("diffusion_steps", "noise_schedule", "rescale_timesteps"):
        if model[flag] != classifier[flag]:
            raise ValueError(f"{path} was trained with --{flag} {classifier[flag]}, the diffusion model with "
                             f"{model[flag]}: the same time would mean another noise to each; train the classifier "
                             "with the diffusion model's")


def open_base_samples(base, sampler, super_res, process):
    """Return the `LowResConditioning` that `--base_samples` holds, after comparing them with the upsampler."""
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
    labels = _labels_of_base(base.base_samples, samples, sampler) if sampler.num_classes else None
    images = np.moveaxis(samples.images, -1, 1)
    whole = create_diffusion({**process, "timestep_respacing": ""})
    return LowResConditioning(images, labels, sampler.codec, sampler.normalizer, whole, base.cond_noise_level, sampler.seed)


def _labels_of_base(path, samples, sampler):
    """Return the labels of small samples in the upsampler's numbering: by name where both have names."""
    if samples.class_names and sampler.class_names:
        return map_labels(samples, sampler.class_names)
    if samples.labels.min() < 0 or samples.labels.max() >= sampler.num_classes:
        raise ValueError(f"{path} has labels (arr_1) from {samples.labels.min()} to {samples.labels.max()}, the "
                         f"upsampler knows 0 to {sampler.num_classes - 1}; give another --base_samples")
    return samples.labels


def create_sampler(model, diffusion, space, header):
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


def load_model_and_data(run):
    """Return (network, diffusion, source, Space, labels or None): a diffusion model, and held-out data as it sees them.

    The data are a cache or pictures, in the space that the model's header names; a model without a header works on
    pixels. Labels are numbered as the model's classes are, and None where it has none.
    """
    config, given, model, process, data, latents, vae = (
        run[LikelihoodConfig], run.explicit, run[ModelConfig], run[DiffusionConfig], run[DataConfig], run[LatentConfig],
        run[VAEConfig],
    )
    path = resolve_weights(config.model_path, "--model_path")
    if has_header(path):
        network, diffusion, header = load_diffusion_model(path, given, model, process)
        data = apply_trained_preprocessing(data, given, header["data"])
        if latents.cache_dir and (data.data_dir or works_on_pixels(header)):
            raise ValueError(f"--cache_dir {latents.cache_dir} with --data_dir {data.data_dir}: a model of latents is "
                             "measured on one of them, a model of pictures on pictures alone")
        if works_on_pixels(header) or data.data_dir:
            space = open_space(header, vae)
            pictures = open_folder(data, multiple=space.codec.factors)
            source = EncodedImages(pictures, space.codec, statistics={})
        else:
            space = Space(None, LatentNormalizer.from_dict(header["normalizer"]))
            source = open_cache(latents.cache_dir, given)
        found = space_header(source, space)
        if found["autoencoder"] is None:    # a plain folder of latents does not know, and the model has been told
            found["autoencoder"] = header["autoencoder"]
        require_same_space(header, {**header, **found}, source.folder, "the data")
    else:
        pictures = open_folder(data)
        source, space = open_pixels(pictures)
        network, diffusion, header = load_diffusion_model(path, given, model, process, source.latent_shape, pixels=True)
        header = {"classes": source.class_names}
    if not network.num_classes:
        return network, diffusion, source, space, None
    require_labels(source, True)
    return network, diffusion, source, space, map_labels(source, header["classes"])


def resolve_weights(path, flag):
    """Return the weights file that a flag names: itself, or of a run folder the one to use (see `latest_weights`).

    Rank 0 looks and all ranks take what it found, as the run may go on meanwhile.
    """
    if not path:
        raise FileNotFoundError(f"no model given; {flag} wants a run folder, or a model or ema file")
    if not Path(path).is_dir():
        return path
    newest = checkpoint_util.latest_weights(path, flag) if dist_util.rank() == 0 else None
    newest = dist_util.broadcast_object(newest)
    log_rank0(f"{flag} {path}: taking {newest.name}")
    return newest


def has_header(path, flag="--model_path"):
    """Say whether a weights file carries a header."""
    return checkpoint_util.load_weights(path, "meta", flag)[1] is not None


def load_classifier(path, device, given=(), flags=None, process=None, shape=None, flag="--classifier_path"):
    """Rebuild a classifier from its run folder or weights file; return (model, header).

    One without a header, such as a released checkpoint, is described by `flags` (a ClassifierConfig), the process that
    noised its data and the `shape` of x0 [C x ...]; where they are missing it is refused.
    """
    path = resolve_weights(path, flag)
    weights, header = checkpoint_util.load_weights(path, "cpu", flag)
    if header is not None:
        checkpoint_util.require_kind(header, "classifier", path, flag)
        own = {key: value for key, value in dict(given).items() if key.startswith("classifier_")}
        described = flags_from_header(header, own, path, ("model", "diffusion"))
        flags, process = from_dict(ClassifierConfig, described), from_dict(DiffusionConfig, described)
        shape = header["latent_shape"]
    elif flags is None:
        raise ValueError(f"{path} does not say how it is built; {flag} wants a checkpoint of classifier_train.py")
    else:
        flags = dataclasses.replace(flags, classifier_in_channels=shape[0], classifier_dims=len(shape) - 1)
        header = {"classes": None, "noised": True}
    model, _ = build_classifier(flags, process, shape)
    checkpoint_util.load_strict(model, weights, path, flag)
    model.to(device)
    if flags.classifier_use_fp16:
        model.convert_to_fp16()
    return model.eval().requires_grad_(False), header


def sample(run, sampler):
    """Generate the samples of a run into its folder; a dry run prints what would be sampled."""
    config = run[SamplingConfig]
    if sampler.small is not None and sampler.small.labels is not None:
        classes = None
        if config.classes:
            raise ValueError(f"--classes {config.classes}: an upsampler takes the classes of its --base_samples")
    else:
        classes = parse_classes(config.classes, sampler.num_classes or sampler.guided_classes, sampler.class_names)
    log_rank0(sampler.summary())
    if not run.dry_run:
        path = generate_samples(sampler, classes, config, run.folder, dist_util.dev())
        log_rank0(f"saved {config.num_samples} samples to {path}")
        run.finish()
