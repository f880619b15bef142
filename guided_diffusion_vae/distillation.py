"""Progressive distillation (arXiv:2202.00512): a step of the student is several deterministic steps of its teacher.

The steps use nothing of a process but its noise levels and its prediction of x0, and apply to every process.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .config import option, require
from .nn import mean_flat, to_device
from .objectives import DiffusionObjective
from .sampling.solvers import levels


@dataclass
class DistillConfig:
    SECTION = "distillation"

    teacher_path: str = option(
        "", "run of a diffusion model to distill, or a weights file of one; also of a student", essential=True)
    student_steps: int = option(4, "sampling steps of the student", minimum=1, essential=True)
    teacher_steps: int = option(
        0, "equal deterministic steps of the teacher that the student replaces, a multiple of --student_steps; 0: four "
           "times as many, or those of a teacher that is a student", minimum=0, essential=True)
    cfg_scale: float = option(1.0, "scale of classifier-free guidance of the teacher, which the student then has "
                                   "without a second evaluation; 1: none", above=0)


def resolve_steps(config: DistillConfig, of_teacher: int = 0) -> int:
    """Return the steps of the teacher.

    :param of_teacher: those that it was distilled for; 0: it takes any number.
    :raises ValueError: if they differ from these, or are not a multiple of those of the student above one.
    """
    steps = config.teacher_steps or of_teacher or 4 * config.student_steps
    require(
        (steps == (of_teacher or steps), f"--teacher_steps {steps}: the teacher is a student of {of_teacher} steps; "
         "omit the flag"),
        (steps > config.student_steps and steps % config.student_steps == 0, f"--student_steps {config.student_steps} "
         f"does not divide the {steps} steps of the teacher: expected a multiple, at least twice as many; set "
         "--teacher_steps"),
    )
    return steps


class Distillation(DiffusionObjective):
    """The squared error of the student's x0, for which its step ends where several steps of its teacher do.

    :param diffusion: the `Process` of the student, on the last timesteps of equal parts (`trailingN`).
    :param teacher: network of the teacher, possibly guided; called with the conditioning of the student.
    :param teacher_diffusion: its `Process`, with a multiple of the steps of the student.
    :param clip_denoised: the teacher clips its x0 to [-1, 1].
    """

    def __init__(self, diffusion, teacher, teacher_diffusion, schedule_sampler=None, class_dropout=0.0, null_label=None,
                 clip_denoised=False):
        super().__init__(diffusion, schedule_sampler, class_dropout, null_label)
        self.teacher, self.teacher_diffusion, self.clip_denoised = teacher, teacher_diffusion, clip_denoised
        self.ratio = teacher_diffusion.num_timesteps // diffusion.num_timesteps
        self.levels = [torch.tensor(values, dtype=torch.float32) for values in levels(teacher_diffusion)]
        # 1 + SNR of the squared error of x0 is the squared error of the velocity (Sec. 4); 1 without signal.
        self.weights = torch.from_numpy(1.0 + 1.0 / np.square(diffusion.noise_levels())).float()

    def __call__(self, model, x0, cond, rng, loss_scale=1.0):
        t, importance = rng.timesteps(self.schedule_sampler, x0.device)
        x = self.diffusion.q_sample(x0, t, rng.normal(x0.shape[1:], x0.device))
        model_kwargs = self._model_kwargs(cond, rng)
        target = self.target(x, t, model_kwargs)
        predicted = self.diffusion.predict_xstart(model, x, t, clip_denoised=False, model_kwargs=model_kwargs)
        loss = mean_flat((target - predicted) ** 2) * to_device(self.weights, t.device)[t]
        return {"loss": loss * importance, "unweighted": loss.detach()}, t

    @torch.no_grad()
    def target(self, x, t, model_kwargs=None):
        """Return the x0 with which one step of the student from x at its timesteps t ends where its teacher does.

        [N x C x ...], [N] -> [N x C x ...]; Alg. 2 for any number of deterministic steps of the teacher.
        """
        signal, noise = (to_device(values, t.device) for values in self.levels)
        at = lambda values, i: values[i].view(-1, *(1,) * (x.dim() - 1))     # index -1: clean x0
        first = last = (t + 1) * self.ratio - 1
        end = x
        for _ in range(self.ratio):
            x_0 = self.teacher_diffusion.predict_xstart(
                self.teacher, end, last, clip_denoised=self.clip_denoised, model_kwargs=model_kwargs)
            eps = (end - at(signal, last) * x_0) / at(noise, last)
            last = last - 1
            end = at(signal, last) * x_0 + at(noise, last) * eps
        kept = at(noise, last) / at(noise, first)       # of the noise
        return (end - kept * x) / (at(signal, last) - kept * at(signal, first))
