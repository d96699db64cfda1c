"""test_gated_fusion.py: the smoke check of the gating parts, in under a minute on a CPU.

    python test_gated_fusion.py     # prints every step with its values; exit code 1 when one fails
    pytest test_gated_fusion.py     # the same checks

Steps 1-5 look at GatedFusionModule; steps 6-9 at Gated BLIP-2 on the tiny weights that ship: model load, forward with a batch of 2,
generation with a batch of 1, and the training pipeline.
"""

import inspect
import sys

import pytest
import torch

import core
from engine import checkpoints, loop, published


def make_fusion():
    loop.seed_everything(0)
    return core.GatedFusionModule(hidden_size=768).eval()  # eval: dropout would drown the differences


def make_inputs():
    """Image tokens [4,257,768] and text tokens [4,32,768]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, n, 768, generator=generator).requires_grad_() for n in (257, 32)]


def tiny_gated():
    """A Gated BLIP-2 with fresh gates on the tiny weights, which are loaded as published ones are."""
    loop.seed_everything(0)
    places = published.tiny("blip2"), published.tiny("efficientnet-28.pt")
    return core.Blip2OPTGated.build(*places, ["Cubism", "Pointillism"]).eval()


@pytest.fixture(scope="module", name="fusion")
def fusion_fixture():
    return make_fusion()


@pytest.fixture(scope="module", name="inputs")
def inputs_fixture():
    return make_inputs()


@pytest.fixture(scope="module", name="gated")
def gated_fixture():
    return tiny_gated()


def test_1_parameters(fusion):
    count = sum(p.numel() for p in fusion.parameters())
    assert count == 2_952_193
    print(f"GatedFusionModule(hidden_size=768): {count:,} parameters")


def test_2_data(inputs):
    image, text = inputs
    assert image.shape == (4, 257, 768) and text.shape == (4, 32, 768)
    print(f"batch {len(image)}, image tokens {image.shape[1]}, text tokens {text.shape[1]}")


def test_3_forward(fusion, inputs):
    image, text = inputs
    out = fusion(image, text)
    assert out.shape == image.shape
    print(f"input {list(image.shape)}, output {list(out.shape)}")


def test_4_backward(fusion, inputs):
    image, text = inputs
    fusion(image, text).square().mean().backward()
    norms = [x.grad.norm().item() for x in (image, text, fusion.alpha)]
    assert all(norm > 0 for norm in norms)
    print("gradient norms: image_feat {:.6f}, text_feat {:.6f}, alpha {:.6f}".format(*norms))


def test_5_gating(fusion, inputs):
    image, text = inputs
    zero, normal = ((fusion(image, t) - image).abs().mean().item() for t in (torch.zeros_like(text), text))
    assert zero == 0 and normal > 1e-3
    print(f"mean |output - input|: zero text {zero:.6f}, normal text {normal:.6f} (normal > zero: {normal > zero})")


def test_6_model_load(gated):
    *parts, total = checkpoints.parts_table(gated)
    assert {"vision_model", "language_model", "gates", "mapper"} <= {name for name, *_ in parts} and total[1] > 0
    print(f"tiny Gated BLIP-2: {total[1]:,} trainable, {total[2]:,} frozen parameters")


def two_samples(gated):
    """A batch of two, ready for forward."""
    batch = core.encode_training(gated.tokenizer, ["What style is this?", "How many?"], ["Cubism", "three"])
    images = torch.randn(2, 3, gated.image_size, gated.image_size, generator=torch.Generator().manual_seed(1))
    return {**batch, "images": images, "style": torch.tensor([0, 1]), "hit_rows": torch.tensor([True, False])}


def test_7_forward_batch_2(gated):
    out = gated(**two_samples(gated), hit_weight=0.1, kl_weight=0.05)
    assert torch.isfinite(out["loss"]) and out["lm"].shape == (2,)
    print(", ".join(f"{name} {value.float().mean().item():.4f}" for name, value in out.items()))


def test_8_generation_batch_1(gated):
    image = two_samples(gated)["images"][:1]
    answers = gated.predict_answers(image, ["What style is this?"])
    assert len(answers) == 1 and "Question" not in answers[0]
    ranked = gated.predict_answers(image, ["What style is this?"], method="rank", answers=["Cubism", "three"])
    print(f"untrained answer {answers[0]!r}, likeliest of two {ranked[0]!r}")


def test_9_training_pipeline(gated):
    batch, losses = two_samples(gated), []
    optimizer = torch.optim.AdamW([p for p in gated.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        loss = gated(**batch, hit_weight=0.1, kl_weight=0.05)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    print(f"loss on one batch of 2 over 20 steps: {losses[0]:.4f} -> {losses[-1]:.4f}")


def main():
    parts, failed = {"fusion": make_fusion(), "inputs": make_inputs(), "gated": tiny_gated()}, 0
    for name, check in [item for item in globals().items() if item[0].startswith("test_")]:
        number, _, title = name[5:].partition("_")
        print(f"{number}. {title.replace('_', ' ')}: ", end="")
        try:
            check(*(parts[need] for need in inspect.signature(check).parameters))
        except AssertionError as error:
            print(f"FAILED {error}")
            failed += 1
    print(f"{failed} checks failed" if failed else "all tests passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
