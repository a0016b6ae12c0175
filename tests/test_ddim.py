"""Schedules and samplers against closed forms and diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from ddim import IPNDM, T, alpha_bar, ddpm_sample, eval_mode, reseed, sample, timesteps

ZERO_SNR = {0: 0.99990, 99: 0.896378, 499: 0.0760287, 899: 1.06130e-4, 989: 4.57429e-7, 998: 4.213e-9, 999: 0.0}
JDCL = {0: 0.99900, 100: 0.8210, 250: 0.4277, 500: 0.0554, 750: 2.16e-3, 999: 2.57e-5}


@pytest.mark.parametrize("name, values, rtol", [("zero-snr", ZERO_SNR, 1e-4), ("jdcl", JDCL, 2e-3)])
def test_schedule_values(name, values, rtol):
    abar = alpha_bar(name)
    assert abar.shape == (T + 1,) and abar.dtype == torch.float32 and abar[-1] == 1
    for t, value in values.items():
        assert_close(abar[t].item(), value, rtol=rtol, atol=0)
    assert (abar[:-1].diff() < 0).all(), "the signal falls with t"


def test_schedules_are_those_of_diffusers():
    linear = DDIMScheduler(beta_schedule="linear").alphas_cumprod
    rescaled = DDIMScheduler(beta_schedule="linear", rescale_betas_zero_snr=True).alphas_cumprod
    assert_close(alpha_bar("linear")[:-1], linear, rtol=1e-5, atol=1e-7)
    assert_close(alpha_bar("zero-snr")[:-1], rescaled, rtol=0, atol=1e-6)


def test_unknown_schedule_and_steps():
    with pytest.raises(ValueError, match="zero-snr"):
        alpha_bar("cosine")
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            timesteps(steps)


def test_timesteps():
    for steps in range(1, T + 1):
        taus = timesteps(steps)
        assert len(taus) == steps and taus[0] == 999 and taus[-1] >= 0
        assert all(a > b for a, b in zip(taus, taus[1:]))


def test_seed_streams_differ_and_repeat():
    def draw(*key):
        reseed(*key)
        return torch.randn(4)
    assert_close(draw(42, "noise", 1, 0), draw(42, "noise", 1, 0), rtol=0, atol=0)
    keys = [(42, "noise", 1, 0), (42, "noise", 1, 1), (42, "noise", 2, 0), (43, "noise", 1, 0), (42, "order", 1, 0)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)


def one_image(x_0, abar):
    """The exact eps when all data are the one image x_0: eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
    def model(x_t, t):
        a = abar[t].view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
    return model


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 15, 100, 999, "ddpm"])
@pytest.mark.parametrize("schedule", ["zero-snr", "linear", "jdcl"])
def test_samplers_return_the_one_image(schedule, steps):
    reseed("test")
    x_0, abar = torch.rand(1, 1, 4, 4) * 1.8 - 0.9, alpha_bar(schedule)
    model, x_T = one_image(x_0, abar), torch.randn(3, 1, 4, 4)
    x = ddpm_sample(model, x_T, abar) if steps == "ddpm" else sample(model, x_T, abar, steps)
    assert_close(x, x_0.expand(3, -1, -1, -1), rtol=0, atol=2e-4)


def gaussian(mean, var, abar):
    """The exact eps when data are N(mean, var): sqrt(1 - abar) (x_t - sqrt(abar) mean) / (abar var + 1 - abar)."""
    def model(x_t, t):
        a = abar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * var + 1 - a)
    return model


def error(steps, **how):
    """How far unclipped samples of N(0.2, 0.3^2) are from the end of the ODE that they follow, known for this data."""
    mean, sd, abar = 0.2, 0.3, alpha_bar("linear").double()
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    end = mean + sd * (x_T - abar[T - 1].sqrt() * mean) / (abar[T - 1] * sd**2 + 1 - abar[T - 1]).sqrt()
    return (sample(gaussian(mean, sd**2, abar), x_T, abar, steps, clip=False, **how) - end).norm()


@pytest.mark.parametrize("first", ["network", "analytic"])
def test_ddim_is_of_first_order_and_ipndm_of_second_or_more(first):
    """Twice the steps, 1/2 of the error or at most 1/4."""
    assert error(20, first=first) / error(40, first=first) == pytest.approx(2, abs=0.2)
    errors = [error(steps, first=first, solver="ipndm") for steps in (10, 20, 40)]
    assert errors[0] / errors[1] > 4 and errors[1] / errors[2] > 4 and errors[2] < 0.05 * error(40, first=first)


def test_ipndm_extrapolates_polynomials_to_the_mean_of_the_next_step():
    """Of s^p at s = 0, -1, -2, ... the mean over 0 .. 1 is 1 / (p + 1), exactly for p below the number of values."""
    for n, coefficients in enumerate(IPNDM, 1):
        for p in range(n):
            mean = sum(a * (-s) ** p for s, a in enumerate(coefficients))
            assert mean == pytest.approx(1 / (p + 1))


@pytest.mark.parametrize("solver", ["ddim", "ipndm"])
def test_an_analytic_first_step_is_that_of_an_exact_model_and_calls_none(solver):
    abar, x_T, calls = alpha_bar("zero-snr"), torch.linspace(-2, 2, 9).view(-1, 1, 1, 1), []
    exact = gaussian(0.2, 0.09, abar)

    def model(x_t, t):
        calls.append(int(t[0]))
        return exact(x_t, t)
    analytic = sample(model, x_T, abar, 2, first="analytic", solver=solver)
    assert calls == [666, 332]
    assert_close(analytic, sample(exact, x_T, abar, 3, solver=solver))
    assert_close(sample(model, x_T, abar, 1, solver="ipndm"), sample(model, x_T, abar, 1))


def smooth(x_t, t):
    """An analytic stand-in for a network, smooth in x_t, so that float errors do not grow as at a clip."""
    return 0.9 * torch.tanh(x_t) + 0.1 * torch.cos(t.float() / 100).view(-1, 1, 1, 1)


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_ddim_equals_diffusers(steps):
    reseed("test")
    scheduler = DDIMScheduler(beta_schedule="linear", timestep_spacing="trailing", clip_sample=True)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps(steps)
    x_T = torch.randn(4, 1, 8, 8)
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(smooth(x, t.expand(4)), t, x, use_clipped_model_output=False).prev_sample
    assert_close(sample(smooth, x_T, alpha_bar("linear"), steps), x, rtol=1e-3, atol=1e-3)


def test_ddpm_equals_diffusers():
    x_T = torch.randn(4, 1, 4, 4)
    scheduler = DDPMScheduler(beta_schedule="linear", clip_sample=True)
    scheduler.set_timesteps(T)
    reseed("same noise")
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(smooth(x, t.expand(4)), t, x).prev_sample
    reseed("same noise")
    assert_close(ddpm_sample(smooth, x_T, alpha_bar("linear")), x, rtol=1e-3, atol=1e-3)


def test_clip_bounds_the_samples():
    x_T, abar = 5 * torch.randn(8, 1, 4, 4), alpha_bar("jdcl")
    assert sample(smooth, x_T, abar, 5).abs().max() <= 1
    assert sample(smooth, x_T, abar, 5, clip=False).abs().max() > 1


def test_sampling_is_in_eval_mode_without_gradients_and_leaves_the_model_alone():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop = torch.nn.Conv2d(1, 1, 1), torch.nn.Dropout(0.5)
            self.frozen = torch.nn.Dropout(0.5).eval()
            self.seen = []

        def forward(self, x, t):
            self.seen.append((self.training, self.drop.training, torch.is_grad_enabled()))
            return self.drop(self.conv(x))

    net = Net()
    out = sample(net, torch.randn(2, 1, 4, 4), alpha_bar(), 3)
    assert net.seen == [(False, False, False)] * 3 and not out.requires_grad
    assert net.training and net.drop.training and not net.frozen.training
    with pytest.raises(RuntimeError), eval_mode(net):
        raise RuntimeError
    assert net.training, "the mode comes back also after an error"
