"""The scheduler classes of diffusers that are ours under other names, and which of their options may say what."""

from __future__ import annotations

from typing import Any

CLASSES = {  # our samplers as diffusers' classes; those that it lacks are not here
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpmpp_2s": "DPMSolverSinglestepScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_3m": "DPMSolverMultistepScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_3m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "lcm": "LCMScheduler",
}
VARIANTS: dict[str, dict[str, Any]] = {  # what tells apart the samplers of one class; the first are its defaults
    "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "dpmpp_3m": {"algorithm_type": "dpmsolver++", "solver_order": 3},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    "dpmpp_3m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
}
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
WITHOUT_SWITCHES = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")  # which read no use_karras_sigmas
WITHOUT_SPACING = ("DPMSolverSinglestepScheduler", "LCMScheduler")  # which do not read timestep_spacing

# Options of diffusers' classes for which we implement one value, which is the default but for skip_prk_steps. What a
# class does not read may say anything. Nobody clips latents, whatever clip_sample says: nor do diffusers' pipelines.
_SIGMAS = {"use_beta_sigmas": False}
_SOLVER = _SIGMAS | {"thresholding": False, "use_dynamic_shifting": False, "use_flow_sigmas": False}
FIXED: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"thresholding": False},
    "DDPMScheduler": {"thresholding": False, "variance_type": "fixed_small"},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": _SIGMAS
    | {
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "sigma_max": None,
        "sigma_min": None,
        "timestep_type": "discrete",
    },
    "HeunDiscreteScheduler": _SIGMAS,
    "KDPM2DiscreteScheduler": _SIGMAS,
    "LMSDiscreteScheduler": _SIGMAS,
    "DPMSolverSDEScheduler": _SIGMAS,
    "DPMSolverSinglestepScheduler": _SOLVER
    | {
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -float("inf"),
        "solver_order": 2,
        "solver_type": "midpoint",
        "variance_type": None,
    },
    "DPMSolverMultistepScheduler": _SOLVER
    | {
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -float("inf"),
        "lower_order_final": True,
        "solver_type": "midpoint",
        "use_lu_lambdas": False,
        "variance_type": None,
    },
    "UniPCMultistepScheduler": _SOLVER
    | {
        "disable_corrector": [],
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "predict_x0": True,
        "sigma_max": None,
        "sigma_min": None,
        "solver_order": 2,
        "solver_p": None,
        "solver_type": "bh2",
    },
    "DEISMultistepScheduler": _SOLVER
    | {"algorithm_type": "deis", "lower_order_final": True, "solver_order": 2, "solver_type": "logrho"},
    "LCMScheduler": {"thresholding": False},
    FLOW_CLASS: _SIGMAS
    | {"invert_sigmas": False, "shift_terminal": None, "use_dynamic_shifting": False, "use_exponential_sigmas": False},
}
# Their defaults where a file leaves out what is most often written: beta_schedule, beta_start, beta_end.
BETAS = ("linear", 1e-4, 0.02)
OTHER_BETAS = {
    "HeunDiscreteScheduler": ("linear", 0.00085, 0.012),
    "KDPM2DiscreteScheduler": ("linear", 0.00085, 0.012),
    "DPMSolverSDEScheduler": ("linear", 0.00085, 0.012),
    "LCMScheduler": ("scaled_linear", 0.00085, 0.012),
}
