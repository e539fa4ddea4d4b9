# SPDX-License-Identifier: Apache-2.0
"""The objective against formulas written out pair by pair in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

import train_dpo_qsd
import train_rankdpo_sdxl
from build_synpic import preference_probability, preference_rank
from train_rankdpo_sdxl import dcg_weights, denoising_error, rankdpo_loss, safeguard_scale


def brute_force(model, ref, phi, rank, beta, loss_type, weights=()):
    """The loss of DESIGN.md section 2 in Python floats; the weighted mean errors of chosen and of rejected images."""
    total, chosen, rejected, sum_of_weights = 0.0, 0.0, 0.0, 0.0
    for n, (m, r, p, order) in enumerate(zip(model, ref, phi, rank)):
        k = len(p)
        pairs = [(i, j) for i in range(k) for j in range(k) if p[i] > p[j]]
        if loss_type == "sft":  # the mean error of the winners of all pairs
            total += sum(m[i] for i, _ in pairs) / max(len(pairs), 1)
            continue
        if loss_type == "weighted_sft":
            total += sum(w * e for w, e in zip(weights[n], m)) / k
            continue
        for i, j in pairs:
            weight = 1.0
            if loss_type in ("rankdpo", "dpo_gain"):
                weight = 2 ** p[i] - 2 ** p[j]
            if loss_type == "rankdpo":
                weight *= abs(1 / math.log2(1 + order[i]) - 1 / math.log2(1 + order[j]))
            margin = -beta / 2 * ((m[i] - r[i]) - (m[j] - r[j]))
            total += weight * math.log1p(math.exp(-margin))
            chosen += weight * (m[i] - r[i])
            rejected += weight * (m[j] - r[j])
            sum_of_weights += weight
    return total / len(phi), chosen / (sum_of_weights or 1), rejected / (sum_of_weights or 1)


def random_batch(seed=0, batch=5, k=4, n_rewards=5):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(batch, n_rewards, k)).round(1)  # rounded: with ties
    phi = np.array([preference_probability(s) for s in scores])
    rank = np.array([preference_rank(s) for s in scores])
    model, ref = rng.uniform(0.05, 0.15, (2, batch, k))
    return torch.tensor(model).float(), torch.tensor(ref).float(), torch.tensor(phi).float(), torch.tensor(rank)


@pytest.mark.parametrize("loss_type", ["rankdpo", "dpo_gain", "dpo", "sft", "weighted_sft"])
@pytest.mark.parametrize("seed, k", [(0, 4), (2, 2), (3, 6)])
def test_loss_equals_brute_force(loss_type, seed, k):
    model, ref, phi, rank = random_batch(seed, k=k)
    phi[0] = 0.5  # a prompt without an order
    weight = torch.rand(phi.shape, generator=torch.Generator().manual_seed(seed))
    loss, metrics = rankdpo_loss(model, ref, phi, 50.0, rank, loss_type, weight=weight)
    numbers = [t.double().tolist() for t in (model, ref, phi)]
    wanted, chosen, rejected = brute_force(*numbers, rank.tolist(), 50.0, loss_type, weight.double().tolist())
    assert metrics["loss"].item() == loss.item() == pytest.approx(wanted, rel=1e-5)
    if "sft" not in loss_type:
        assert metrics["chosen_error"].item() == pytest.approx(chosen, rel=1e-4)
        assert metrics["rejected_error"].item() == pytest.approx(rejected, rel=1e-4)
        anchored, _ = rankdpo_loss(model, ref, phi, 50.0, rank, loss_type, sft_weight=3.0)
        anchor, _, _ = brute_force(*numbers, rank.tolist(), 50.0, "sft")
        assert anchored.item() == pytest.approx(wanted + 3 * anchor, rel=1e-5)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_plackett_luce_is_the_probability_of_the_ranking(k):
    """Against all permutations: images drawn one after the other, each with probability proportional to exp(f)."""
    model, ref, _, _ = random_batch(k, batch=1, k=k)
    strength = (-25.0 * (model - ref)[0].double()).exp().tolist()
    total = 0.0
    for order in itertools.permutations(range(k)):
        phi = torch.tensor([[(k - 1 - order.index(i)) / (k - 1) for i in range(k)]])
        loss, metrics = rankdpo_loss(model, ref, phi, 50.0, loss_type="plackett_luce")
        left, wanted = list(order), 1.0
        while left:
            wanted *= strength[left[0]] / sum(strength[i] for i in left)
            left.pop(0)
        assert math.exp(-loss.item()) == pytest.approx(wanted, rel=1e-5)
        total += math.exp(-loss.item())
    assert total == pytest.approx(1.0, rel=1e-5)
    same, _ = rankdpo_loss(ref, ref, phi, 50.0, loss_type="plackett_luce")
    assert same.item() == pytest.approx(math.log(math.factorial(k)), rel=1e-6)
    # Ties do not compete: here only the first image has others to win against.
    tied = torch.tensor([[1.0] + [0.0] * (k - 1)])
    loss, _ = rankdpo_loss(model, ref, tied, 50.0, loss_type="plackett_luce")
    assert math.exp(-loss.item()) == pytest.approx(strength[0] / sum(strength), rel=1e-5)
    if k == 2:
        dpo, _ = rankdpo_loss(model, ref, tied, 50.0, loss_type="dpo")
        assert loss.item() == pytest.approx(dpo.item(), rel=1e-6)


@pytest.mark.parametrize("k", [2, 5])
def test_lair_equals_brute_force(k):
    """Diffusion-LAIR, equations 6 and 7 of arXiv 2605.26491, in Python floats; its optimum and its start."""
    beta, tau, penalty = 3000.0, 0.3, 2e-3
    model, ref, _, _ = random_batch(k, k=k)
    rewards = torch.randn(model.shape, generator=torch.Generator().manual_seed(k)) + 21  # as PickScore's
    total = anchor = 0.0
    for errors, references, r in zip(*(values.double().tolist() for values in (model, ref, rewards))):
        exponentials = [math.exp(value / tau) for value in r]
        weights = [value / sum(exponentials) - 1 / k for value in exponentials]
        implicit = [beta / 2 * (reference - error) for error, reference in zip(errors, references)]
        total -= sum(w * s for w, s in zip(weights, implicit))
        total += penalty / k * sum(s * s for s in implicit)
        anchor += sum(errors[i] for i in range(k) for j in range(k) if r[i] > r[j]) / math.comb(k, 2)
    options = {"loss_type": "lair", "lair": (tau, penalty)}
    loss, metrics = rankdpo_loss(model, ref, rewards, beta, **options)
    assert loss.item() == metrics["loss"].item() == pytest.approx(total / len(model), rel=1e-4)
    assert loss != rankdpo_loss(model, ref, rewards, beta, loss_type="lair")[0]
    anchored, _ = rankdpo_loss(model, ref, rewards, beta, sft_weight=2.0, **options)
    assert anchored.item() == pytest.approx((total + 2 * anchor) / len(model), rel=1e-4)
    same, metrics = rankdpo_loss(ref, ref, rewards, beta, **options)
    assert same.item() == 0 and metrics["implicit_accuracy"].item() == 0.5
    # Proposition 1: the loss is smallest where the implicit reward is k·w / 2λ.
    advantages = (rewards.double() / tau).softmax(dim=1) - 1 / k
    best = ref.double() - k * advantages / (2 * penalty) / (beta / 2)
    best.requires_grad_()
    rankdpo_loss(best, ref.double(), rewards.double(), beta, **options)[0].backward()
    assert best.grad.abs().max() < 1e-9 * beta


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_safeguard_scales_as_diffusion_sdpo_does(mu):
    """One pair: lambda from the gradients of the two errors with respect to the predictions (arXiv 2511.03317)."""
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for sign in (1, -1, 0.1):
        target = torch.randn(1, 2, 4, 8, 8, generator=generator)
        residual = torch.randn(1, 4, 8, 8, generator=generator)
        prediction = target + torch.stack([residual, sign * residual + 0.3 * residual.roll(1, 0).flip(3)], dim=1)
        prediction.requires_grad_()
        errors = (prediction - target).square().mean((2, 3, 4))[0]
        won, lost = (torch.autograd.grad(errors[i], prediction, retain_graph=True)[0][0, i] for i in (0, 1))
        product = (won * lost).sum()
        wanted = min(1.0, ((1 - mu) * won.square().sum() / product).item()) if product > 0 else 1.0
        scale = safeguard_scale(prediction, target, mu)
        assert scale[0, 0, 1].item() == pytest.approx(wanted, rel=1e-4) and not scale.requires_grad
        # The value of the loss stays; the loser's gradient is scaled, the winner's is not.
        phi, ref = torch.tensor([[1.0, 0.0]]), torch.full((1, 2), 0.5)
        gradients = []
        for loser_scale in (None, scale):
            leaf = errors.detach()[None].requires_grad_()
            loss, metrics = rankdpo_loss(leaf, ref, phi, 10.0, loss_type="dpo", loser_scale=loser_scale)
            gradients.append((loss.item(), metrics["margin"].item(), *torch.autograd.grad(loss, leaf)[0][0].tolist()))
        assert gradients[0][:3] == gradients[1][:3]
        assert gradients[1][3] == pytest.approx(wanted * gradients[0][3], rel=1e-4, abs=1e-12)
        # To first order the winner's error does not rise in the space of predictions.
        assert -won.square().sum() + scale[0, 0, 1] * product <= -mu * won.square().sum() + 1e-6
        seen.add(wanted)
    assert len(seen) > 1
    # Many pairs at once: each as if alone. In the training the step runs under autocast, where a matrix product of
    # 65,536 residuals would overflow.
    target, prediction = torch.randn(2, 3, 4, 4, 8, 8, generator=generator)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            large = safeguard_scale(300 * prediction, 300 * target, mu)
        assert large.dtype == torch.float32 and torch.isfinite(large).all()
        assert torch.allclose(large, safeguard_scale(prediction, target, mu), rtol=1e-5)
    scale = safeguard_scale(prediction, target, mu)
    for b, i, j in itertools.product(range(3), range(4), range(4)):
        alone = safeguard_scale(prediction[b, [i, j]][None], target[b, [i, j]][None], mu)[0, 0, 1]
        assert scale[b, i, j].item() == pytest.approx(alone.item(), rel=1e-3)


def test_rank_overrides_the_rank_by_phi():
    phi, rank = torch.tensor([[0.8, 0.4, 0.2]]), torch.tensor([[2, 1, 3]])
    weight = dcg_weights(phi, rank)[0, 0, 1].item()
    assert weight == pytest.approx((2**0.8 - 2**0.4) * (1 - 1 / math.log2(3)), rel=1e-6)
    # Taken from the model: image 2 denoised best, so it ranks first.
    scores = torch.tensor([[0.03, 0.01, 0.02]])
    loss, _ = rankdpo_loss(scores, torch.zeros(1, 3), phi, 100.0, rank_source="predicted")
    wanted, _ = rankdpo_loss(scores, torch.zeros(1, 3), phi, 100.0, rank=torch.tensor([[3, 1, 2]]))
    assert loss == wanted


def test_ties_of_ranks_go_to_the_higher_mean_standardised_reward_then_to_the_position():
    assert preference_rank([[1.0, 0.0, 0.9], [0.0, 1.0, 0.9]]).tolist() == [2, 3, 1]
    assert preference_rank([[1.0, 1.0, 1.0]]).tolist() == [1, 2, 3]
    assert preference_rank([[0.0, 5.0], [9.0, 0.0]]).tolist() == [1, 2]


def test_probabilities_are_shares_of_the_comparisons_and_ranks_follow_them():
    """With ties. Neither depends on scale or order of the rewards, nor do probabilities on the order of the images."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, k = rng.integers((1, 2), (6, 7))
        scores, names, images = rng.uniform(-3, 3, (n, k)).round(1), rng.permutation(n), rng.permutation(k)
        phi, rank = preference_probability(scores), preference_rank(scores)
        wins = [sum(row[i] > row[j] for row in scores for j in range(k)) / (n * (k - 1)) for i in range(k)]
        assert phi.tolist() == pytest.approx(wins) and phi.sum() <= k / 2 + 1e-9
        assert sorted(rank.tolist()) == list(range(1, k + 1)) and (np.diff(phi[np.argsort(rank)]) <= 1e-12).all()
        assert np.array_equal(preference_probability(scores[names]), phi)
        assert np.array_equal(preference_probability(scores[:, images]), phi[images])
        assert np.array_equal(preference_rank(scores[names]), rank)
        assert np.array_equal(preference_rank(scores / 8), rank)  # a power of two, which rounds nothing


def test_error_is_reduced_in_float32():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(2, 4, 64, 64, generator=generator).bfloat16()
    target = torch.randn(2, 4, 64, 64, generator=generator)
    error = denoising_error(prediction, target)
    assert error.dtype == torch.float32
    wanted = (target.double() - prediction.double()).square().mean((1, 2, 3))
    assert torch.allclose(error.double(), wanted, rtol=1e-6)


# Trainer, its model, what the model predicts, whose sizes an SDXL UNet is told.
STEPS = [
    (train_rankdpo_sdxl, "tiny_sdxl", "epsilon", "resolution"),
    (train_rankdpo_sdxl, "tiny_sdxl", "v_prediction", "image"),
    (train_dpo_qsd, "tiny_sdxl", "epsilon", "resolution"),
    (train_dpo_qsd, "tiny_sd", "epsilon", "resolution"),
    (train_dpo_qsd, "tiny_sd", "v_prediction", "resolution"),
]


@pytest.mark.parametrize("script, model, predicts, time_ids", STEPS)
def test_step_passes_its_options_to_the_loss(script, model, predicts, time_ids, request):
    """Loss and gradient with all options, against the loss of predictions by hand, with the textbook's noise."""
    folder, k = request.getfixturevalue(model), 2 if script is train_dpo_qsd else 4
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    script.add_lora(unet, rank=4)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    sizes = torch.tensor([[96.0, 64, 8, 0], [40, 100, 0, 24], [32, 32, 0, 0], [64, 64, 0, 0]])
    batch = {
        "latents": torch.randn(2, k, 4, 8, 8),
        "noise": torch.randn(2, 1, 4, 8, 8).expand(2, k, 4, 8, 8),
        "timesteps": torch.tensor([40, 910]),
        "prompt_embeds": torch.randn(2, 16, unet.config.cross_attention_dim),
        "pooled_prompt_embeds": torch.randn(2, 16),
        "time_ids": torch.cat([sizes, torch.full((4, 2), 32.0)], dim=1)[:k].expand(2, k, 6),
        "phi": torch.tensor([[0.9, 0.3, 0.6, 0.1], [0.2, 0.2, 0.8, 0.8]])[:, :k],
        "rank": torch.tensor([[1, 3, 2, 4], [3, 4, 1, 2]])[:, :k],
    }
    options = {"orpo_lambda": 0.3} if script is train_dpo_qsd else {"rank_source": "predicted", "time_ids": time_ids}
    args = script.ScriptArguments(dataset_name="x", beta_dpo=50.0, sft_weight=0.7, safeguard=0.9, **options)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", prediction_type=predicts)
    loss, _ = script.training_step(unet, unet, scheduler, batch, args)
    gradient = torch.autograd.grad(loss, parameters)

    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    signal, spread = (share[batch["timesteps"]].view(2, 1, 1, 1, 1).sqrt() for share in (kept, 1 - kept))
    latents, noise = batch["latents"].double(), batch["noise"].double()
    target = (noise if predicts == "epsilon" else signal * noise - spread * latents).float()
    ids = batch["time_ids"] if time_ids == "image" else torch.tensor([32.0, 32, 0, 0, 32, 32]).expand(2, k, 6)
    added = {"text_embeds": batch["pooled_prompt_embeds"].repeat_interleave(k, 0), "time_ids": ids.flatten(0, 1)}
    inputs = [(signal * latents + spread * noise).float().flatten(0, 1)]
    inputs += [batch[name].repeat_interleave(k, 0) for name in ("timesteps", "prompt_embeds")]

    def predict() -> torch.Tensor:
        return unet(*inputs, added_cond_kwargs=added).sample.view(noise.shape)

    unet.disable_adapters()
    with torch.no_grad():
        reference = predict()
    unet.enable_adapters()
    prediction = predict()
    errors, references = ((found - target).square().mean((2, 3, 4)) for found in (prediction, reference))
    scale = safeguard_scale(prediction, target, 0.9)
    assert scale.min() < 1
    if script is train_dpo_qsd:
        both = (*errors.unbind(1), *references.unbind(1))
        wanted, _ = train_dpo_qsd.pair_loss(*both, 50.0, sft_weight=0.7, loser_scale=scale[:, 0, 1])
    else:
        settings = {"rank_source": "predicted", "sft_weight": 0.7, "loser_scale": scale}
        wanted, _ = rankdpo_loss(errors, references, batch["phi"], 50.0, batch["rank"], **settings)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for found, by_hand in zip(gradient, torch.autograd.grad(wanted, parameters)):
        assert torch.allclose(found, by_hand, rtol=1e-3, atol=1e-5)
    if script is train_dpo_qsd:  # and without a reference
        args.loss_type, args.safeguard = "orpo", None
        loss, _ = script.training_step(unet, unet, scheduler, batch, args)
        options = {"orpo_lambda": 0.3, "sft_weight": 0.7}
        wanted, _ = train_dpo_qsd.pair_loss(*errors.unbind(1), None, None, 50.0, "orpo", **options)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
