"""Noise schedules, the forward process and two samplers, DDIM and DDPM: a diffusion model without its network.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)            DDPM, Ho et al., arXiv 2006.11239v2, Equation 4
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                 the same, as `q_sample` computes it

Symbols, the same in every file of this project:

    x_0, x_t     (B, C, H, W) float32; x_0 lies in [-1, 1], x_t is its noisy version, x_T the noise sampling starts at
    eps          (B, C, H, W) standard Gaussian noise; model(x_t, t) predicts it
    t, T         (B,) int64 in 0 .. T-1, T = 1000; the papers count 1 .. T
    abar         (T + 1,) float32, alpha-bar; one extra last entry makes abar[-1] = 1, the clean image
    k            number of the task, from 1; prev is the frozen model of task k-1
    *_r          whatever is replayed; lam is the papers' lambda; y are labels
"""

import hashlib
from contextlib import contextmanager

import torch
from torch import nn

T = 1000  # diffusion steps
# What improved PNDM makes of the last 1, 2, 3 and 4 eps: the coefficients of Adams and Bashforth.
IPNDM = (1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)


def reseed(*key):
    """Start the random stream named by `key` in torch's generators, such as reseed(42, "noise", task, update).

    Each stream depends on its own key and on nothing drawn before, so a resumed run, an extra picture or a second
    device moves no other stream. Keys are ints and strings. torch's CPU generator knows 2^32 streams, so that a few of
    10^5 updates share theirs.
    """
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big"))


def alpha_bar(schedule="zero-snr"):
    """abar_t = prod_{s<=t} (1 - beta_s), a (T + 1,) float32 table on the CPU; abar[-1] = 1 stands for the clean image.

    "linear"    beta from 1e-4 to 0.02, linear in t (DDPM, Section 4)
    "jdcl"      beta from 1e-3 to 0.02, linear in t (JDCL, arXiv 2411.08224)
    "zero-snr"  "linear" with sqrt(abar) shifted and scaled so that abar_999 = 0 exactly while abar_0 stays
                (Lin et al., arXiv 2305.08891v4, Algorithm 1)

    DEVIATION: the paper implies "linear", its released runs train and sample with "zero-snr"; we follow the runs.
    """
    if schedule not in ("zero-snr", "linear", "jdcl"):
        raise ValueError(f"schedule must be zero-snr, linear or jdcl, not {schedule!r}")
    beta = torch.linspace(1e-3 if schedule == "jdcl" else 1e-4, 0.02, T, dtype=torch.float64)
    root = (1 - beta).cumprod(0).sqrt()
    if schedule == "zero-snr":
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return torch.cat([root**2, torch.ones(1, dtype=torch.float64)]).float()


def q_sample(x_0, t, eps, abar):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM, Equation 4); images (B, C, H, W), t (B,)."""
    a = abar[t].view(-1, 1, 1, 1)  # (B,) -> (B, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def timesteps(steps):
    """The `steps` times, 1 .. 1000 of them, at which DDIM calls the model: 2 -> 999 499; 10 -> 999 899 ... 99.

    "Trailing" spacing (Lin et al., Table 2): sampling starts at t = 999, where the image is pure noise.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1 to {T}, not {steps}")
    return [round(T - j * T / steps) - 1 for j in range(steps)]


def predict(model, x_t, t):
    """eps = model(x_t, t), float32; t is one int for all images."""
    return model(x_t, torch.full((len(x_t),), t, device=x_t.device)).float()


def denoise(x_t, eps, t, abar, clip):
    """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), in [-1, 1] if `clip`; t is one int."""
    # DEVIATION: 1e-8 is in the released runs, not in the paper. abar_999 is 0, so clipped x_0 is sign(x_t - eps) there.
    x_0 = (x_t - (1 - abar[t]).sqrt() * eps) / (abar[t] + 1e-8).sqrt()
    return x_0.clamp(-1, 1) if clip else x_0


@torch.no_grad()
def sample(model, x_T, abar, steps, clip=True, first="network", solver="ddim"):
    """DDIM (Song et al., arXiv 2010.02502v4, Equation 12 with sigma = 0): x_T (B, C, H, W) ~ N(0, I) -> x_0.

        x <- sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps

    where s is the time after t in `timesteps(steps)`, the clean image after the last. With `clip` x_0 is kept in
    [-1, 1], but eps is not recomputed from it. The model is in eval mode, without gradients.

    first="analytic"  one more step, the first, without the model: at t = 999 all is noise, so eps = x_T; x_0 becomes 0
    solver="ipndm"    eps is extrapolated from the last four: improved PNDM (Zhang and Chen, arXiv 2204.13902)
    """
    taus, history = timesteps(steps + (first == "analytic")) + [-1], []
    with eval_mode(model):
        x = x_T
        for t, s in zip(taus[:-1], taus[1:]):
            analytic = first == "analytic" and t == T - 1
            eps = x if analytic else predict(model, x, t)
            if solver == "ipndm":
                history = [eps, *history[:3]]
                eps = sum(a * e for a, e in zip(IPNDM[len(history) - 1], history))
            x_0 = torch.zeros_like(x) if analytic else denoise(x, eps, t, abar, clip)
            x = abar[s].sqrt() * x_0 + (1 - abar[s]).sqrt() * eps
    return x


@torch.no_grad()
def ddpm_sample(model, x_T, abar, clip=True):
    """Ancestral sampling over all T steps (DDPM, Algorithm 2), x_T (B, C, H, W) ~ N(0, I) -> x_0.

        x_{t-1} = (sqrt(abar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - abar_{t-1}) x_t) / (1 - abar_t) + sigma_t z
        sigma_t^2 = beta_t (1 - abar_{t-1}) / (1 - abar_t)

    This is the x_0 form of the posterior mean (Equation 7): the eps form divides by alpha_t, which is 0 at t = 999. No
    noise is added at the last step, where sigma is 0.
    """
    with eval_mode(model):
        x = x_T
        for t in range(T - 1, -1, -1):
            x_0 = denoise(x, predict(model, x, t), t, abar, clip)
            alpha = abar[t] / abar[t - 1]  # abar[-1] = 1 makes this right at t = 0 too
            mean = abar[t - 1].sqrt() * (1 - alpha) * x_0 + alpha.sqrt() * (1 - abar[t - 1]) * x
            x = mean / (1 - abar[t])
            if t > 0:
                x = x + ((1 - alpha) * (1 - abar[t - 1]) / (1 - abar[t])).sqrt() * torch.randn_like(x)
    return x


@contextmanager
def eval_mode(model):
    """`with eval_mode(model):` switches dropout off and leaves the model as it was; the model may be any function."""
    modules = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m in modules:
            m.training = True
