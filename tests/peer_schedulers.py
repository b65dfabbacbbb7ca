"""Schedulers of diffusers in float64."""

import numpy as np
import pytest
import torch


def peer(name, **config):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    return precise(getattr(diffusers, name)(**config))


def precise(scheduler):
    """The peer with betas in float64, which NumPy makes of its configuration."""
    config, count = scheduler.config, scheduler.config.num_train_timesteps
    if "beta_schedule" not in config:
        return scheduler
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas, np.float64)
    elif config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, count)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    else:
        t = np.arange(count + 1) / count
        cosines = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - cosines[1:] / cosines[:-1], 0.999)
    products = np.cumprod(1 - betas)
    if config.get("rescale_betas_zero_snr"):
        roots = np.sqrt(products)
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        products = roots**2
        products[-1] = float(scheduler.alphas_cumprod[-1])
    scheduler.alphas_cumprod = torch.from_numpy(products)
    if getattr(scheduler, "final_alpha_cumprod", None) is not None and float(scheduler.final_alpha_cumprod) != 1:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler
