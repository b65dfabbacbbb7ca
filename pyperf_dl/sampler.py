"""Samplers of diffusion and flow-matching models: a step in one pass, tables for every common sampler, the loop."""

from __future__ import annotations

from ._sampler_brownian import BrownianNoise
from ._sampler_loop import Sampler
from ._sampler_schedules import NoiseSchedule
from ._sampler_step import SamplerStep, per_sample_noise, sampler_step
from ._sampler_step_table import StepTable

__all__ = ["BrownianNoise", "NoiseSchedule", "Sampler", "SamplerStep", "StepTable", "per_sample_noise", "sampler_step"]
