"""Load models, samplers and evaluation inputs from checkpoints, whose headers describe them.

A bare state dict, such as a released checkpoint, has no header: its model is described by the flags, from which a
header is made. Flags that conflict with the header of a checkpoint are rejected.
"""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import torch

from .. import checkpoint_util, dist_util
from ..config import as_dict, format_shape, from_dict, integers, require, size, to_tuple
from ..data import (
    Attributes, ConditionConfig, DataConfig, map_labels, open_colormap, open_folder, open_npz, parse_size,
    require_data_dir, require_labels, same_colormap,
)
from ..evaluation import (
    EvaluateConfig, EvaluationClassifier, HeldOutData, ImageSet, LikelihoodConfig, SampleFile, classifier_features,
    inception_features, latent_features, open_sample_file,
)
from ..data.axes import SpectrogramConfig, resolve_axes
from ..evaluation.anomaly import AnomalyConfig, Detector, find_anomalous, positive_levels
from ..evaluation.physics import Physics
from ..files import file_errors, sha256_of_file, write_record
from ..logger import log_rank0, progress
from ..sampling import (
    OWNED_MARKER, SAMPLE_FILES, SAMPLING_RECORD, Autoguidance, ClassifierFreeGuidance, CompiledNetwork,
    LowResConditioning, Sampler, SamplingConfig, Unconditional, classifier_cond_fn, decoded_shape,
    deterministic_sampler, generate_samples, noise_levels, resolve_sampler, save_image, timesteps_in_interval,
)
from ..sampling.editing import EDITS, EditingConfig, box, require_mode
from .factories import (
    NUM_CLASSES, ClassifierConfig, DiffusionConfig, ModelConfig, SuperResConfig, build_classifier, create_diffusion,
    create_model_and_diffusion_vae,
)
from .spaces import (
    EncodedImages, LatentConfig, LatentNormalizer, Space, VAEConfig,
    apply_trained_preprocessing, create_vae, open_cache, open_pixels,
    open_sample_conditions, open_space, require_same_space, space_header, works_on_pixels,
)

# Flags of the model that do not change its weights, and may therefore differ from its header.
SAMPLING_OVERRIDABLE = ("timestep_respacing", "use_fp16", "use_checkpoint", "recompute_norms", "dropout",
                        "classifier_use_fp16")
# Flags of the networks and images that SAMPLING_RECORD names.
RECORDED_PATHS = "model_path", "guide_model_path", "classifier_path", "vae_path", "base_samples", "data_dir"
_NOT_BUILT = "its header and the flags describe no model", "check the file and the flags of the model"


# --- Models ---


def open_weights(path, flag="--model_path") -> checkpoint_util.Weights:
    """Return the `Weights` of a run folder or weights file; rank 0 chooses the file and hashes it once.

    All ranks must call this, and all open the same file, although the run may continue meanwhile.
    """
    require((path, f"{flag} is not set: expected a run folder, or a model or ema file"), error=FileNotFoundError)
    file, sha256 = dist_util.broadcast_object(
        checkpoint_util.find_weights(path, flag) if dist_util.rank() == 0 else None
    )
    if file != path:
        log_rank0(f"{flag} {path}: using {file.name}")
    return checkpoint_util.Weights(*checkpoint_util.load_weights(file, "cpu", flag), file, sha256)


def load_diffusion_model(weights, explicit=None, kind="diffusion", flag="--model_path"):
    """Return (network, process) of `Weights` with a header, or of an upsampler with kind "super_res".

    :param explicit: flags set explicitly; those of SAMPLING_OVERRIDABLE override the header.
    :raises ValueError: if others conflict with the header, or the weights are of another kind.
    """
    header = weights.header
    checkpoint_util.require_kind(header, kind, weights.path, flag)
    flags = _flags_from_header(weights, explicit or {}, ("model", "diffusion", "super_res"))
    require((not flags.get("condition_on") or header.get("attributes"), f"{weights.path} has no statistics of the "
             "attributes of --condition_on; omit the flag, or use a checkpoint of this project"))
    with file_errors(weights.path, *_NOT_BUILT):
        model, diffusion_config = from_dict(ModelConfig, flags), from_dict(DiffusionConfig, flags)
        super_res = from_dict(SuperResConfig, flags) if kind == "super_res" else None
        network, diffusion = create_model_and_diffusion_vae(
            tuple(header["latent_shape"]), model, diffusion_config, super_res, works_on_pixels(header),
            (header.get("condition") or {}).get("channels", 0),
        )
    student = header.get("distillation")
    require((not student or diffusion.timestep_map == create_diffusion(header["diffusion"]).timestep_map,
             f"--timestep_respacing {diffusion_config.timestep_respacing} conflicts with {weights.path}, which was "
             f"distilled for {student and student['steps']} steps; omit the flag"))
    return _prepare(network, weights, model.use_fp16, flag), diffusion


def load_classifier(weights, explicit=None, flag="--classifier_path"):
    """Return the classifier of `Weights` with a header; arguments as in `load_diffusion_model`."""
    header = weights.header
    require((header, f"{weights.path} has no header; {flag} expects a checkpoint of classifier_train.py"))
    checkpoint_util.require_kind(header, "classifier", weights.path, flag)
    own = {key: value for key, value in (explicit or {}).items() if key.startswith("classifier_")}
    flags = _flags_from_header(weights, own, ("model", "diffusion"))
    with file_errors(weights.path, *_NOT_BUILT):
        config = from_dict(ClassifierConfig, flags)
        model, _ = build_classifier(config, from_dict(DiffusionConfig, flags), header["latent_shape"])
    return _prepare(model, weights, config.classifier_use_fp16, flag).requires_grad_(False)


def _flags_from_header(weights, explicit, sections):
    """Return the flags of sections of a header, overridden by explicit ones of SAMPLING_OVERRIDABLE."""
    flags = {key: value for section in sections for key, value in (weights.header.get(section) or {}).items()}
    for key, value in explicit.items():
        if key in flags and key not in SAMPLING_OVERRIDABLE:
            _require_equal(key, value, to_tuple(flags[key]), weights.path)
    return {**flags, **{key: explicit[key] for key in SAMPLING_OVERRIDABLE if key in explicit}}


def _require_equal(flag, value, trained, path):
    require((value == trained, f"--{flag} {value} conflicts with {path}, trained with {flag} {trained}; omit the flag"))


def _prepare(network, weights, use_fp16, flag):
    checkpoint_util.load_strict(network, weights.state_dict, weights.path, flag)
    network.to(dist_util.dev())
    if use_fp16:
        network.convert_to_fp16()
    return network.eval()


# --- Samplers ---


def load_sampler(run, scale=None, guidance=None, base=None) -> Sampler:
    """Return the Sampler of a sampling script, an `ImageEdit` if the run has an EditingConfig.

    :param scale: a NormalizerConfig, if a bare state dict works on latents; None: on pixels.
    :param guidance: a GuidanceConfig, if a classifier guides the model.
    :param base: a BaseConfig, if the model is an upsampler.
    """
    config, explicit = run[SamplingConfig], run.explicit
    if EditingConfig in run:
        require_mode(config, explicit, run[DataConfig].data_dir)
    if "vae_dtype" not in explicit:
        run = run.override(dataclasses.replace(run[VAEConfig], vae_dtype=config.sample_dtype))
    weights, space = open_weights(config.model_path), None
    if weights.header is None:
        space, explicit = _space_from_flags(run, weights.path, scale), {}
        weights = weights._replace(header=_header_from_flags(run, space, base is not None))
    network, diffusion = load_diffusion_model(weights, explicit, "super_res" if base else "diffusion")
    header = weights.header
    space = space or open_space(header, run[VAEConfig])
    image_shape = decoded_shape(header, space.codec)
    _require_described(run, weights.path, image_shape, space.normalizer)
    if config.sample_dtype == "bfloat16":
        require((not network.use_fp16, "--sample_dtype bfloat16 and --use_fp16 are mutually exclusive; set only one"))
        network.convert_to_bf16()
    settings = {"model": weights.sha256, "sample_dtype": config.sample_dtype}
    if not space.is_pixels and run[VAEConfig].vae_dtype != "float32":   # runs of version 0.3 recorded no defaults
        settings["vae_dtype"] = run[VAEConfig].vae_dtype
    if config.compile:
        log_rank0("--compile True: the first step takes minutes, which pay off after thousands of samples")
        settings["compile"] = True
        network = _compiled(config, network)
    fields = {"settings": settings}
    if "clip_denoised" in run.explicit:
        fields["clip_denoised"] = config.clip_denoised
    projection = _projection(config.project_colormap, header, image_shape)
    if projection:
        fields["projection"] = fields["settings"]["project_colormap"] = projection
    if config.save_db:
        fields["spectrogram"] = _spectrogram_axes(run, header, image_shape, projection)
    _request_attributes(config, header, fields)
    model = _guided_network(run, config, network, diffusion, weights, fields)
    if guidance:
        _classifier_guidance(run, guidance, weights, fields)
    if base:
        _low_res_conditioning(run, base, header, space, image_shape, fields)
    else:
        _condition(run, header, space, fields)
    kind, solver = Sampler, _solver(config, header, diffusion, weights.path)
    if EditingConfig in run:
        kind, diffusion, solver = _image_edit(run, header, image_shape, diffusion, solver, fields)
    return kind.from_header(model, diffusion, space, header, solver=solver, seed=config.seed, **fields)


def _solver(config, header, diffusion, path):
    """Return the sampler of a SamplingConfig for a model; a student has the one of its distillation."""
    if not header.get("distillation"):
        return resolve_sampler(config, diffusion)
    own = deterministic_sampler(diffusion)
    solver = resolve_sampler(config, diffusion) if config.sampler or config.use_ddim else own
    require((solver == own, f"--sampler {solver} conflicts with {path}, which was distilled for steps of {own}; omit "
             "the flag"))
    return solver


def _request_attributes(config, header, fields):
    """Add the fields of a Sampler with the ranges of `--attributes`, and log those that were not trained."""
    attributes = Attributes.from_dict(header.get("attributes"))
    require((attributes or not config.attributes, f"--attributes {config.attributes}: the model was trained without "
             "--condition_on; omit the flag"))
    if attributes:
        ranges = attributes.parse_ranges(config.attributes)
        for line in attributes.warnings(ranges, header["model"].get("class_dropout", 0) > 0):
            log_rank0(f"warning: {line}; such samples are extrapolated")
        fields["attribute_ranges"] = ranges
        fields["settings"]["attributes"] = config.attributes


def _compiled(config, network):
    """Return the network, compiled for the sizes that batches of a SamplingConfig have."""
    size = min(config.batch_size, config.num_samples or config.batch_size)
    doubled = (config.cfg_scale not in (0, 1) or config.cfg_interval) and not config.guide_model_path
    return CompiledNetwork(network, {2 * size if doubled else size, *([size] if config.cfg_interval else [])})


def _space_from_flags(run, path, scale):
    """Return the Space of a bare state dict."""
    if scale is None:
        return Space.of_pixels(run[DataConfig].image_channels or 3)
    mode = scale.normalizer
    require((mode not in ("auto", "channel"), f"{path} is a bare state dict without the statistics of --normalizer "
             f"{mode}; set it to the number that its latents were divided by, or none"))
    codec = create_vae(run[VAEConfig], dist_util.dev())
    return Space(codec, LatentNormalizer.fit(mode, None))


def _header_from_flags(run, space, upsampler):
    """Return the header that a bare state dict would have."""
    model, data = run[ModelConfig], run[DataConfig]
    sides = parse_size(run[SuperResConfig].large_size if upsampler else data.image_size)
    shape = [data.image_channels or space.codec.in_channels, *sides]
    classes = (model.num_classes or NUM_CLASSES) if model.class_cond else 0
    return {"kind": "super_res" if upsampler else "diffusion", "model": {**as_dict(model), "num_classes": classes},
            "super_res": as_dict(run[SuperResConfig]) if upsampler else None,
            "diffusion": as_dict(run[DiffusionConfig]),
            "classes": None, "latent_shape": list(space.codec.latent_shape(shape)), "image_shape": shape,
            "normalizer": space.normalizer.to_dict(), "autoencoder": space.codec.describe()}


def _require_described(run, path, image_shape, normalizer):
    """Reject flags of images and normalizer that conflict with the model; zeros mean its values."""
    channels, *sides = image_shape
    trained = {"image_size": size(format_shape(sides)), "image_channels": channels, "normalizer": normalizer.mode}
    for flag, value in trained.items():
        if run.explicit.get(flag):
            _require_equal(flag, run.explicit[flag], value, path)


def _projection(requested, header, image_shape):
    """Return the name of the table that a value of --project_colormap requests for the samples of a model, or ""."""
    if requested.lower() in ("", "false"):
        return ""
    recognized = (header.get("data") or {}).get("recognized_colormap", "")
    by_name = requested.lower() != "true"
    require(
        (len(image_shape) == 3 and image_shape[0] == 3, f"--project_colormap {requested}: expected a model of RGB "
         f"images, got samples of shape {tuple(image_shape)}; omit the flag"),
        (recognized or by_name, f"--project_colormap {requested}: the model does not record a colormap of its training "
         "images; set the name of one, such as --project_colormap jet"),
    )
    return recognized if not by_name or same_colormap(requested, recognized) else open_colormap(requested).name


def _spectrogram_axes(run, header, image_shape, projection):
    """Return the axes and the scale of the samples of a model of spectrograms, None where they are unknown."""
    require(
        (len(image_shape) == 3, "--save_db True: expected a model of spectrograms, got samples of shape "
         f"{tuple(image_shape)}; omit the flag"),
        (image_shape[0] == 1 or projection, "--save_db True: the model makes RGB images; set --project_colormap True, "
         "by which colors become levels"))
    recorded = (header.get("data") or {}).get("spectrogram") or {}
    return resolve_axes(run[SpectrogramConfig], recorded, image_shape[1:], "the model", required=("db_range",))


def _guided_network(run, config, network, diffusion, weights, fields):
    """Return the network, with classifier-free guidance or autoguidance if `--cfg_scale` requests it."""
    trained, scale, settings = weights.header["model"], config.cfg_scale, fields["settings"]
    require(
        (scale != 1 or not config.cfg_interval,
         f"--cfg_interval {config.cfg_interval} has no effect with --cfg_scale 1; set --cfg_scale"),
        (scale not in (0, 1) or not config.cfg_rescale,
         f"--cfg_rescale {config.cfg_rescale} has no effect with --cfg_scale {scale:g}; set another --cfg_scale"),
    )
    guided = (weights.header.get("distillation") or {}).get("cfg_scale", 1)
    require((scale == 1 or guided == 1, f"--cfg_scale {scale:g} conflicts with {weights.path}, a student that is "
             f"guided with scale {guided:g} by itself; omit the flag"))
    guide, guide_sha256 = _open_guide(config, run.explicit, weights)
    if scale == 1:
        return network
    interval = noise_levels.parse(config.cfg_interval, "cfg_interval")
    timesteps = timesteps_in_interval(diffusion, interval) if interval else None
    require((guide or trained.get("class_dropout"), f"--cfg_scale {scale} requires a model trained with "
             f"--class_dropout > 0; {weights.path} was not and has no unconditional prediction; alternatively set "
             "--guide_model_path"),
            (timesteps or not interval, f"--cfg_interval {config.cfg_interval}: none of the {diffusion.num_timesteps} "
             "steps has a noise level inside; use a wider interval"))
    settings.update(cfg_scale=scale, cfg_interval=config.cfg_interval)
    if config.cfg_rescale:      # only then, so that samplings that version 0.3 has started are resumed
        settings["cfg_rescale"] = config.cfg_rescale
    if guide:
        settings["guide_model"] = guide_sha256
        compiled = _compiled(config, guide) if config.compile else guide
        if network.num_attributes and not guide.num_attributes:
            compiled = _without_attributes(compiled)
        return Autoguidance(network, compiled, scale, timesteps, config.cfg_rescale, bool(guide.num_classes))
    if scale == 0 and not interval:
        # Labels and attributes would claim what the samples do not have.
        require((not config.attributes, f"--attributes {config.attributes} has no effect with --cfg_scale 0; omit it"))
        fields.update(num_classes=0, class_names=None, attributes=None)
        return Unconditional(network, trained["num_classes"] if trained["class_cond"] else None)
    return ClassifierFreeGuidance(network, trained["num_classes"], scale, timesteps, config.cfg_rescale)


def _without_attributes(network):
    """Return a network that ignores attributes: the guide may have been trained without."""
    return lambda x, timesteps, attributes=None, **conditioning: network(x, timesteps, **conditioning)


def _open_guide(config, explicit, weights):
    """Return (network of --guide_model_path, its SHA-256), (None, None) if it is not set.

    :raises ValueError: if its x0, process, prediction or classes are not those of the model that it guides.
    """
    flag, header = "--guide_model_path", weights.header
    if not config.guide_model_path:
        return None, None
    opened = open_weights(config.guide_model_path, flag)
    require((opened.header, f"{opened.path} has no header; {flag} expects a checkpoint of this project"))
    described = opened.header
    explicit = {name: explicit[name] for name in ("use_fp16",) if name in explicit}     # others describe the model
    guide, _ = load_diffusion_model(opened, explicit, header["kind"], flag)
    require_same_space(header, described, opened.path, flag)
    _require_same_flags(header, described, opened.path, (*_NOISE_FLAGS, "predict_xstart", "predict_v"),
                        "so that predictions differ; use a guide trained like the model")
    conditions = [each.get("condition") for each in (header, described)]
    low_res = [(each.get("super_res") or {}).get("small_size") for each in (header, described)]
    classes = [(each["model"]["num_classes"], each["classes"]) for each in (header, described)]
    require(
        (conditions[0] == conditions[1], f"{opened.path} ({flag}): expected the conditions (--condition_dir) of the "
         f"model, {conditions[0]}, got {conditions[1]}"),
        (described.get("attributes") in (None, header.get("attributes")), f"{opened.path} ({flag}): expected the "
         "attributes of the model, or none, trained on the same data; use another guide"),
        (low_res[0] == low_res[1], f"{opened.path} ({flag}): expected an upsampler of low-resolution images of size "
         f"{low_res[0]}, got {low_res[1]}"),
        (not guide.num_classes or classes[0] == classes[1], f"{opened.path} ({flag}): expected the classes of the "
         f"model, {_describe_classes(*classes[0])}; got {_describe_classes(*classes[1])}"),
    )
    if config.sample_dtype == "bfloat16":
        guide.convert_to_bf16()
    return guide, opened.sha256


def _describe_classes(count, names):
    return ", ".join(names) if names else f"{count} without names" if count else "none"


# Flags of a process on which the noise of a timestep depends.
_NOISE_FLAGS = ("process", "diffusion_steps", "noise_schedule", "rescale_timesteps")


def _require_same_flags(header, other, path, flags, advice):
    """Check that the processes of two headers, of the diffusion model and of the model at `path`, agree in `flags`."""
    processes = [from_dict(DiffusionConfig, each["diffusion"]) for each in (header, other)]
    for flag in flags:
        expected, found = (vars(config)[flag] for config in processes)
        require((expected == found, f"{path} was trained with --{flag} {found}, the diffusion model with {expected}, "
                 f"{advice}"))


def _classifier_guidance(run, guidance, weights, fields):
    """Add the fields of a Sampler that a classifier guides."""
    header = weights.header
    opened = open_weights(guidance.classifier_path, "--classifier_path")
    explicit, shape, bare = run.explicit, header["latent_shape"], opened.header is None
    if bare:
        config = dataclasses.replace(run[ClassifierConfig], classifier_in_channels=shape[0],
                                     classifier_dims=len(shape) - 1)
        explicit, opened = {}, opened._replace(header={
            "kind": "classifier", "model": as_dict(config), "diffusion": as_dict(run[DiffusionConfig]),
            "latent_shape": shape, "classes": None, "noised": True,
        })
    classifier, described = load_classifier(opened, explicit), opened.header
    require((described["noised"] is not False, f"{opened.path} was trained on clean data (--noised False); guidance "
             "requires a classifier trained with --noised True"))
    if not bare:
        require_same_space(header, described, opened.path, "--classifier_path")
        _require_same_flags(header, described, opened.path, _NOISE_FLAGS,
                            "so that timesteps differ in noise; train the classifier with the latter")
    names = described["classes"], header["classes"]
    require((not all(names) or names[0] == names[1], f"{opened.path}: expected the classes of the diffusion model, "
             f"{', '.join(names[1] or ())}; got {', '.join(names[0] or ())}"))
    fields.update(cond_fn=classifier_cond_fn(classifier, guidance.classifier_scale),
                  guided_classes=classifier.out_channels, class_names=names[1] or names[0])
    fields["settings"].update(classifier=opened.sha256, classifier_scale=guidance.classifier_scale)


def _condition(run, header, space, fields):
    """Add the field of a Sampler whose samples have the conditions of `--condition_dir`."""
    if ConditionConfig not in run:
        require((not header.get("condition"), "the model was trained with --condition_dir, which this script does not "
                 "have; use a sampling script"))
        return
    condition = open_sample_conditions(run[ConditionConfig], run[DataConfig], header, space)
    if condition is not None:
        fields["condition"] = condition
        fields["settings"]["condition"] = condition.fingerprint


def _low_res_conditioning(run, base, header, space, image_shape, fields):
    """Add the fields of a Sampler that upsamples `--base_samples`."""
    super_res = from_dict(SuperResConfig, header["super_res"])
    path, level, classes = base.base_samples, base.cond_noise_level, header["model"]["num_classes"]
    require((path, "--base_samples is not set: expected an .npz of low-resolution samples"), error=FileNotFoundError)
    require(("://" in path or Path(path).is_file(), f"{path} is not a file: expected an .npz of low-resolution "
             "samples; check --base_samples"), error=FileNotFoundError)
    samples = open_npz(path)
    shape = samples.images.shape[-1], *samples.images.shape[1:-1]
    expected = (image_shape[0], *parse_size(super_res.small_size))
    highest = max(super_res.cond_noise_steps - 1, 0)
    require(
        (shape == expected, f"{path}: the upsampler requires images of shape {expected} (channels, sides), got "
         f"{shape}; use another --base_samples"),
        (not classes or samples.labels is not None, f"{path} (--base_samples) has no labels (arr_1), which the "
         "upsampler requires; sample the low-resolution images with a class-conditional model"),
        (0 <= level <= highest, f"--cond_noise_level must be in [0, {highest}], got {level}; the upsampler was trained "
         f"with --cond_noise_steps {super_res.cond_noise_steps}"),
    )
    unspaced = create_diffusion({**header["diffusion"], "timestep_respacing": ""})
    fields["low_res"] = LowResConditioning(
        np.moveaxis(samples.images, -1, 1), _base_labels(path, samples, classes, header["classes"]), space.codec,
        space.normalizer, unspaced, level, run[SamplingConfig].seed,
    )
    fields["settings"].update(base=sha256_of_file(path) if dist_util.rank() == 0 else None, cond_noise_level=level)


def _base_labels(path, samples, num_classes, class_names):
    """Return the labels of low-resolution samples in the numbering of the upsampler: by name if both have names."""
    if not num_classes:
        return None
    if samples.class_names and class_names:
        return map_labels(samples, class_names)
    low, high = samples.labels.min(), samples.labels.max()
    require((0 <= low <= high < num_classes, f"{path}: labels (arr_1) must be in [0, {num_classes - 1}], the classes "
             f"of the upsampler, got {low} to {high}; use another --base_samples"))
    return samples.labels


def _image_edit(run, header, image_shape, diffusion, solver, fields):
    """Return (class of the sampler, process, solver) of an EditingConfig, and add the fields of the class."""
    config, settings, seeds = run[EditingConfig], fields["settings"], integers.parse(run[EditingConfig].seeds, "seeds")
    settings["mode"] = config.mode
    if not seeds:
        source = fields["source"] = _edited_images(run, header.get("data") or {}, image_shape)
        settings["images"] = source.fingerprint
        inverts = config.mode in ("interpolate", "invert")
        num_classes = fields.get("num_classes", header["model"]["num_classes"])     # none with --cfg_scale 0
        if num_classes and source.labels is not None and (inverts or not config.classes):
            fields["source_labels"] = map_labels(source, header["classes"]) if header["classes"] else source.labels
        require((not (inverts and num_classes) or source.labels is not None,
                 f"{source.folder} has no classes, but --mode {config.mode} finds the noise of an image with its own "
                 "class; expected images with the classes of the model"))
        _edited_attributes(config, header, source, inverts, fields)
    own = {"inpaint": {"times": config.resampling, "section": config.resampling_steps},
           "variation": {"strength": config.strength}, "invert": {"refinements": config.refinements},
           "interpolate": {"refinements": config.refinements, "frames": config.num_frames, "seeds": seeds}}[config.mode]
    fields.update(own)
    settings.update(own, seeds=list(seeds))
    if config.mode == "inpaint":
        fields["region"], settings["region"] = _region(config, source)
    if config.mode == "variation":
        diffusion = diffusion.truncated(max(1, round(config.strength * diffusion.num_timesteps)))
    if config.mode in ("invert", "interpolate"):
        require((diffusion.num_timesteps > 1, "--timestep_respacing: expected 2 steps or more for an inversion, got 1"))
        solver = deterministic_sampler(diffusion)
        require((config.sampler in ("", solver), f"--sampler {config.sampler} does not apply to the process of the "
                 f"model: expected {solver}; omit it"))
    pairs = len(source) - 1 if config.mode == "interpolate" and not seeds else math.inf
    require(
        (pairs > 0, f"{run[DataConfig].data_dir} has one image: --mode interpolate expects at least two"),
        (config.num_samples <= pairs * config.num_frames, f"--num_samples {config.num_samples}: expected at most "
         f"{pairs * config.num_frames}, --num_frames {config.num_frames} for each of {pairs} pairs of images"),
        (config.mode != "interpolate" or config.num_samples % config.num_frames == 0, f"--num_samples "
         f"{config.num_samples}: expected a multiple of --num_frames {config.num_frames}, all frames of each pair; "
         "change one of them"),
    )
    return EDITS[config.mode], diffusion, solver


def _edited_attributes(config, header, source, required, fields):
    """Add the fields of an `ImageEdit` whose results have the attributes of their images, unless others are requested.

    :param required: the images must have them, as an inversion depends on them.
    """
    attributes = fields.get("attributes", Attributes.from_dict(header.get("attributes")))   # None with --cfg_scale 0
    if attributes and (required or set(attributes.names) <= set(source.attributes)):
        fields["source_attributes"] = attributes.raw_values(source)
        if not config.attributes:
            fields["attribute_ranges"] = ()


def _edited_images(run, preprocessing, shape, flag="--data_dir"):
    """Return the source of images that are edited or scored, read as the model was trained, without padding."""
    data = apply_trained_preprocessing(run[DataConfig], run.explicit, preprocessing)
    source = open_folder(data, flag=flag, pad=False)
    require((tuple(source.shape) == tuple(shape), f"{source.folder}: expected images of shape {tuple(shape)}, on which "
             f"the model was trained, got {tuple(source.shape)}; check {flag}, --image_size and --image_channels"))
    return source


def _region(config, source):
    """Return (region of an `Inpainting`, its setting) by --mask_box or --mask_dir."""
    sides = source.shape[1:]
    if config.mask_box:
        ranges = box.parse(config.mask_box, "mask_box")
        require((len(ranges) == len(sides) and all(stop <= n for (_, stop), n in zip(ranges, sides)),
                 f"--mask_box {config.mask_box}: expected {len(sides)} ranges within {format_shape(sides)}"))
        region = np.zeros(sides, bool)
        region[tuple(slice(*each) for each in ranges)] = True
        return region, config.mask_box
    masks = open_folder(DataConfig(
        data_dir=config.mask_dir, image_size=format_shape(sides), image_channels=1 if len(sides) == 2 else 0,
        crop=source.config.crop, label_column="none", orientation=source.config.orientation, allow_ignored=True,
    ), flag="--mask_dir")
    stem = lambda name: Path(str(name)).name.split(".")[0]
    if len(masks) > 1:
        require((len(masks) == len(source), f"{config.mask_dir} has {len(masks)} masks: expected one, or one for each "
                 f"of {len(source)} images of {source.folder}; add or remove some, or set another --mask_dir"))
        for mask, image in zip(masks.names, source.names):
            require((stem(mask) == stem(image), f"{config.mask_dir} (--mask_dir): expected a mask named {stem(image)} "
                     f"for the image {image}, got {mask}; rename it"))
    return masks, masks.fingerprint


def edit(run, sampler) -> None:
    """Write the edited images of a run into its folder, with a sheet and a report; a dry run prints a summary."""
    config = run[EditingConfig]
    config = dataclasses.replace(config, num_samples=config.num_samples or sampler.count)
    path = sample(run.override(config), sampler)
    if path and dist_util.rank() == 0:
        results = np.moveaxis(open_npz(path).images, -1, 1)
        save_image(run.folder / "edits.png", sampler.sheet(results))
        run.write_report({"mode": config.mode, **sampler.report(results)})
    dist_util.barrier()


def sample(run, sampler: Sampler) -> Path | None:
    """Generate the samples of a run into its folder and return their path; a dry run prints a summary of them."""
    config = run[SamplingConfig]
    classes = sampler.parse_classes(config.classes)
    if config.classes:
        log_rank0(f"classes: {sampler.format_classes(config.classes)}")
    log_rank0(sampler.summary())
    if not run.dry_run:
        path = generate_samples(sampler, classes, config, run.folder, dist_util.dev())
        if dist_util.rank() == 0:   # by which `study.seen_images` finds the images that the networks were trained on
            paths = {name: os.path.abspath(run.setting(name)) for name in RECORDED_PATHS if run.setting(name)}
            write_record(run.folder / SAMPLING_RECORD, {"samples": path.name, "paths": paths,
                                                        "settings": sampler.settings})
        log_rank0(f"saved {config.num_samples} samples to {path}")
        return path
    return None


# --- Anomalies ---


# The flags of an AnomalyConfig, without those of sampling that do not apply.
ANOMALY_FLAGS = ("model_path", "batch_size", "sampler", "clip_denoised", "sample_dtype", "seed", "noise_levels",
                 "bound", "reference_dir", "neighbors", "normal_classes", "bootstrap", "save_maps")


def open_detector(run) -> Detector:
    """Return the Detector of an AnomalyConfig: an unconditional model, and images of the shape of its training.

    A model with classes is evaluated without one, as those of images to examine are unknown.

    :raises ValueError: if it cannot be, if images have another shape, or a noise level is beyond those of the model.
    """
    config = run[AnomalyConfig]
    require((run[DataConfig].data_dir, "--data_dir is not set: expected images to examine"), error=FileNotFoundError)
    opened = open_weights(config.model_path)
    header, levels = opened.header, positive_levels.parse(config.noise_levels, "noise_levels")
    require((header, f"{opened.path} has no header; --model_path expects a checkpoint of this project"))
    checkpoint_util.require_kind(header, "diffusion", opened.path, "--model_path")
    trained = header["model"]
    require(
        (not trained.get("num_classes") or trained.get("class_dropout"), f"{opened.path} has classes and was trained "
         "without --class_dropout: the classes of images to examine are unknown; use a model trained with --class_cond "
         "False or --class_dropout 0.1"),
        (not trained.get("condition_on"), f"{opened.path} was trained with --condition_on "
         f"{trained.get('condition_on')}: the attributes of images to examine are unknown; use a model trained "
         "without it"),
    )
    unconditional = dataclasses.replace(config, cfg_scale=0.0 if trained.get("num_classes") else 1.0)
    sampler = load_sampler(run.override(unconditional))
    sigmas = sampler.diffusion.noise_levels()
    require((levels and max(levels) <= sigmas.max(), f"--noise_levels {config.noise_levels}: expected levels of "
             f"{opened.path}, {sigmas.min():.3g} to {sigmas.max():.3g}"))
    timesteps = {level: int(np.abs(np.log(sigmas / level)).argmin()) for level in levels}
    preprocessing = header.get("data") or {}
    source = _edited_images(run, preprocessing, sampler.image_shape)
    detector = Detector(sampler, source, timesteps, neighbors=config.neighbors, bound=config.bound)
    find_anomalous(detector.source, config.normal_classes)
    if config.reference_dir:
        data = dataclasses.replace(run[DataConfig], data_dir=config.reference_dir)
        reference = _edited_images(run.override(data), preprocessing, sampler.image_shape, "--reference_dir")
        require((len(reference) >= config.neighbors, f"{reference.folder} (--reference_dir) has {len(reference)} "
                 f"images: expected at least --neighbors {config.neighbors}; lower it, or add images"))
        if not run.dry_run:
            detector = dataclasses.replace(detector, bank=_encode_all(detector, reference, config.batch_size))
    return detector


@torch.no_grad()
def _encode_all(detector, source, batch_size):
    """Return x0 of all images of a source, float32 [N x D] on the CPU; the ranks share the work."""
    batches = [range(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)]
    own = [detector.encode(source.batch(np.array(batch)), dist_util.dev()).flatten(1).cpu().numpy()
           for batch in progress(batches[dist_util.rank()::dist_util.world_size()], "reference images")]
    return torch.from_numpy(np.concatenate([part for parts in dist_util.gather_objects(own) for part in parts]))


# --- Evaluations ---


def require_sets(config: EvaluateConfig) -> None:
    """Check that the sets of an EvaluateConfig exist, before anything slow starts."""
    for flag in ("reference", "samples", "train_dir"):
        path = vars(config)[flag]
        require((path or flag == "train_dir", f"--{flag} is not set: expected a folder of images or an .npz of "
                 "samples"), error=FileNotFoundError)
        if path:
            require_data_dir(str(path), f"--{flag}")


def open_sets(run) -> dict[str, ImageSet]:
    """Return the sets of an evaluation, {"reference": ImageSet, "samples": ImageSet} and optionally "training"."""
    config, data = run[EvaluateConfig], run[DataConfig]
    flags = {"reference": "reference", "samples": "samples", "training": "train_dir"}
    samples = open_set(config.samples, data, "--samples")
    requested = data.colormap or ("" if "colormap" in run.explicit else "auto")
    if same_colormap(requested, samples.colormap):  # real images are read as the scalars that the samples are
        data = dataclasses.replace(data, colormap=samples.colormap)
    sets = {name: samples if name == "samples" else open_set(vars(config)[flag], data, f"--{flag}")
            for name, flag in flags.items() if vars(config)[flag]}
    if data.colormap and not samples.colormap:  # RGB samples, which are only near to the table of real images
        data = dataclasses.replace(data, colormap=sets["reference"].colormap or data.colormap)
        if isinstance(samples.images, SampleFile):
            samples.images.set_colormap(data.colormap)
        else:
            sets["samples"] = open_set(config.samples, data, "--samples")
    return sets


def open_set(path, data: DataConfig, flag: str) -> ImageSet:
    """Return the `ImageSet` of an .npz archive, of the samples of a run, or of a folder read by a DataConfig."""
    archives = [path] if str(path).endswith(".npz") else []
    if flag == "--samples" and not archives:
        archives = sorted(file for file in Path(path).glob("samples_*.npz") if SAMPLE_FILES.fullmatch(file.name))
    require((len(archives) < 2, f"{path} contains {', '.join(Path(file).name for file in archives)}; use one of them "
             f"as {flag}"))
    opened = open_sample_file(archives[0], data.colormap) if archives else None
    if opened is not None:
        return opened
    if (Path(path) / OWNED_MARKER).exists():    # generated images have 8 bits, whatever the range of the real values
        data = dataclasses.replace(data, value_range="", value_window="", dynamic_range_db=0.0, reference_db="",
                                   crop="center", patches_per_volume=1, label_column="", allow_ignored=True)
    return ImageSet(str(path), open_folder(data, flag=flag, data_dir=str(path)))


def open_extractors(run):
    """Return (extract, EvaluationClassifier or None, DataConfig) of an evaluation.

    `extract` returns the features of images, and the DataConfig has the preprocessing that they were trained with.
    """
    config, vae = run[EvaluateConfig], run[VAEConfig]
    classifier, preprocessing = None, {}
    if config.classifier_path:
        weights = open_weights(config.classifier_path, "--classifier_path")
        model, header = load_classifier(weights), weights.header
        space, preprocessing = open_space(header, vae), header["data"]
        extract = classifier_features(model, None if space.is_pixels else space.encode)
        classifier = EvaluationClassifier(extract, header["classes"], header["image_shape"])
    if config.inception_path:
        extract = inception_features(config.inception_path, dist_util.dev())
    elif not classifier and config.physics and not vae.vae_path:
        extract = None
    elif not classifier:
        require((vae.vae_path, "no source of features is set; set --classifier_path (a run of classifier_train.py), "
                 "--inception_path (for FID), or --vae_path (latents of an autoencoder)"), error=FileNotFoundError)
        codec = create_vae(vae, dist_util.dev())
        extract, preprocessing = latent_features(codec), codec.preprocessing
    return extract, classifier, apply_trained_preprocessing(run[DataConfig], run.explicit, preprocessing)


def open_physics(run, sets) -> Physics | None:
    """Return what an evaluation measures of spectrograms, None without --physics.

    :raises ValueError: if sets are volumes, statistics or RGB of no colormap, or their axes are unknown or differ.
    """
    config = run[EvaluateConfig]
    if not config.physics:
        require((not config.clutter_hz, f"--clutter_hz {config.clutter_hz:g} has no effect without --physics True"))
        return None
    found, colormap = [], ""
    for images in sets.values():
        require((images.images is not None, f"{images.path} contains statistics: --physics True requires images"))
        preprocessing = getattr(images.images, "preprocessing", {})
        found += [(images.path, preprocessing["spectrogram"])] if preprocessing.get("spectrogram") else []
        colormap = colormap or preprocessing.get("recognized_colormap", "")
    source, recorded = found[0] if found else (sets["reference"].path, {})
    channels, *sides = sets["samples"].images.shape
    require(
        *((other == recorded, f"{path} and {source} have different axes, {other} and {recorded}; compare spectrograms "
           "of the same settings") for path, other in found),
        (len(sides) == 2, f"{sets['samples'].path} contains volumes: --physics True requires spectrograms"),
        (channels == 1 or colormap, f"{sets['samples'].path} contains RGB images whose colormap is unknown: --physics "
         "True requires their levels; set --colormap to the name of theirs, or --image_channels 1 for grayscale"))
    axes = resolve_axes(run[SpectrogramConfig], recorded, sides, source)
    log_rank0(f"spectrograms: rows of {axes.row_hz:g} Hz, zero Doppler in row {axes.zero_row}, {axes.first_row} "
              f"frequencies at the top; frames of {axes.column_s:g} s; {axes.db_range:g} dB from {axes.db_floor:g} dB")
    highest = float(np.abs(axes.doppler).max())
    require((config.clutter_hz < highest, f"--clutter_hz {config.clutter_hz:g} leaves no row of {source}: expected "
             f"less than its highest Doppler frequency, {highest:g}; set a lower one"))
    return Physics(axes, config.clutter_hz, open_colormap(colormap) if channels == 3 else None)


def load_model_and_data(run):
    """Return (network, process, HeldOutData): a diffusion model, and held-out data in its space.

    The data are a cache or images. A bare state dict works on pixels. Labels are numbered as the classes of the model.
    """
    config, data, latents = run[LikelihoodConfig], run[DataConfig], run[LatentConfig]
    weights = open_weights(config.model_path)
    header = weights.header
    if header is None:
        source, space = open_pixels(open_folder(data))
        header = {"kind": "diffusion", "model": as_dict(run[ModelConfig]), "classes": source.class_names,
                  "diffusion": as_dict(run[DiffusionConfig]), **space_header(source, space)}
        network, diffusion = load_diffusion_model(weights._replace(header=header))
    else:
        require((not header.get("condition"), f"{weights.path} was trained with --condition_dir, of which likelihoods "
                 "are not computed"))
        network, diffusion = load_diffusion_model(weights, run.explicit)
        data = apply_trained_preprocessing(data, run.explicit, header["data"])
        pixels = works_on_pixels(header)
        require((not latents.cache_dir or not (data.data_dir or pixels), f"--cache_dir {latents.cache_dir} conflicts "
                 f"with {f'--data_dir {data.data_dir}' if data.data_dir else 'a model of pixels'}; omit one of them"))
        if pixels or data.data_dir:
            space = open_space(header, run[VAEConfig])
            source = EncodedImages(open_folder(data, multiple=space.codec.factors), space.codec, statistics={})
        else:
            space = Space(None, LatentNormalizer.from_dict(header["normalizer"]))
            source = open_cache(latents.cache_dir, run.explicit)
        found = space_header(source, space)
        # A plain folder of latents has no description of its autoencoder.
        found["autoencoder"] = found["autoencoder"] or header["autoencoder"]
        require_same_space(header, {**header, **found}, source.folder, "the data")
    labels = None
    if network.num_classes:
        require_labels(source, True)
        labels = map_labels(source, header["classes"])
    attributes = Attributes.from_dict(header.get("attributes"))
    return network, diffusion, HeldOutData(source, space, labels, attributes and attributes.of_items(source))
