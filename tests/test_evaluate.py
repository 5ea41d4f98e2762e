"""Metrics are exact and leave the model as it was; BatchNorm statistics are averages over the images drawn."""

import math

import pytest
import torch
from torch import nn

from coppice.data import load_data
from coppice.errors import CoppiceError
from coppice.evaluate import evaluate, reestimate_batchnorm, wilson_interval
from coppice.forward import forward, inference_layout, logits, weights_in
from coppice.models import load_model
from coppice.preprocess import Preprocess


class Echo(nn.Module):
    """Its input is its output: the test decides the logits."""

    def forward(self, x):
        return x


class ViewNet(nn.Module):
    """Flattens a feature map with `view`, which a channels_last map does not allow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
        self.linear = nn.Linear(4 * 8 * 8, 10)

    def forward(self, x):
        return self.linear(self.conv(x).view(x.size(0), -1))


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 10))


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_metrics_by_hand():
    z = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [0, 9, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0.0]])
    y = torch.tensor([0, 2, 1, 6])  # right; second; sixth; seventh
    metrics = evaluate(Echo(), [(z, y)], None)
    assert metrics.top1 == 25
    assert metrics.top5 == 50
    assert metrics.n == 4
    assert metrics.per_class == (100, 0, 0, None, None, None, 0)
    assert metrics.loss == pytest.approx(float(nn.functional.cross_entropy(z, y)), rel=1e-6)


def test_top5_of_three_classes_is_top3():
    assert evaluate(Echo(), [(torch.randn(6, 3), torch.tensor([0, 1, 2] * 2))], None).top5 == 100


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (50, 100, 40.38, 59.62), (8838, 10000, 87.74, 88.99)]
)
def test_wilson_interval(right, n, low, high):
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=0.005)


def test_metrics_do_not_depend_on_the_batch_size(digits):
    torch.manual_seed(0)
    model = small_net()
    results = [evaluate(model, digits.test, digits.preprocess, batch_size=size) for size in (7, 100, 1000)]
    assert len({(r.top1, r.top5, r.per_class, r.n) for r in results}) == 1
    assert results[0].loss == pytest.approx(results[2].loss, rel=1e-6)
    images = [(torch.stack([digits.test[k][0] for k in range(len(digits.test))]).float() / 255, digits.test.labels)]
    assert evaluate(model, images, None).per_class == results[0].per_class


def test_the_model_is_left_as_it_was(digits):
    model = small_net().train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = [parameter.data_ptr() for parameter in model.parameters()]
    evaluate(model, digits.test, digits.preprocess)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_flags_come_back_after_an_error(digits):
    model = small_net().train()
    with pytest.raises(CoppiceError):
        evaluate(model, [(torch.randn(2, 1, 8, 8), torch.tensor([0, 10]))], None)
    assert model.training


def test_a_limit_takes_images_of_all_classes(tmp_path, digits):
    order = digits.test.labels.argsort().tolist()
    by_class = digits.test.subset(order)
    metrics = evaluate(small_net(), by_class, digits.preprocess, limit=50)
    assert metrics.n == 50
    assert None not in metrics.per_class
    classes = [(digits.test.labels == c).nonzero()[0][:25].tolist() for c in range(10)]
    in_turn = digits.test.subset([index for one_of_each in zip(*classes, strict=True) for index in one_of_each])
    assert None not in evaluate(small_net(), in_turn, digits.preprocess, limit=50).per_class  # a stride of five sees two classes
    batch = (torch.randn(8, 1, 8, 8), torch.arange(8))
    assert evaluate(small_net(), [batch] * 4, None, limit=20).n == 20
    assert evaluate(small_net(), [batch], None, limit=20).n == 8


def test_progress_is_told(digits):
    seen = []
    evaluate(small_net(), digits.test, digits.preprocess, batch_size=200, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(200, 359), (359, 359)]


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no images to evaluate on"),
        ([(torch.full((2, 3), math.nan), torch.tensor([0, 1]))], "loss is nan"),
        ([(torch.tensor([[math.inf, 0.0]]), torch.tensor([0]))], "loss is nan"),
        ([(torch.zeros(2, 3), torch.tensor([0, 3]))], "label 3, the model 3 outputs"),
        ([(torch.zeros(2, 3), torch.tensor([-1, 0]))], "label -1"),
        ([(torch.zeros(2, 3, 4), torch.tensor([0, 1]))], "one row of class scores"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(batches, words):
    with pytest.raises(CoppiceError) as error:
        evaluate(Echo(), batches, None)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [torch.zeros(4), torch.zeros(4, 1, dtype=torch.int64)], ids=["fractions", "columns"])
def test_labels_that_are_none(labels):
    with pytest.raises(CoppiceError, match="one whole number an image"):
        evaluate(torch.nn.Linear(3, 2), [(torch.zeros(4, 3), labels)], None)


def test_an_unknown_precision(digits):
    with pytest.raises(CoppiceError, match="choose one of fp32, bf16"):
        evaluate(small_net(), digits.test, digits.preprocess, precision="fp8")


def test_logits_are_found_in_what_models_return():
    z = torch.zeros(2, 3)
    assert logits(z) is z
    assert logits({"logits": z}) is z
    with pytest.raises(CoppiceError, match="returned a tuple"):
        logits((z,))


def test_bf16_is_close_to_fp32(digits):
    torch.manual_seed(0)
    model = small_net()
    exact, rounded = (evaluate(model, digits.test, digits.preprocess, precision=precision) for precision in ("fp32", "bf16"))
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)


def test_a_model_that_views_a_feature_map_keeps_its_layout(digits):
    x = torch.randn(4, 1, 8, 8)
    assert inference_layout(ViewNet(), x) is torch.contiguous_format
    assert inference_layout(small_net(), x) is torch.channels_last
    assert evaluate(ViewNet(), digits.test, digits.preprocess).n == 359


def test_weights_in_another_layout_compute_the_same_and_come_back():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).eval(), torch.randn(2, 3, 8, 8)
    kept = model[0].weight.data
    expected = forward(model, x)
    with weights_in(model, torch.channels_last):
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(forward(model, x, layout=torch.channels_last), expected)
    assert model[0].weight.data_ptr() == kept.data_ptr()
    assert model[0].weight.is_contiguous()


def test_reestimated_statistics_are_the_averages_of_the_batches(digits):
    torch.manual_seed(0)
    model = small_net().train()
    batches = [(torch.randn(16, 1, 8, 8) * (k + 1), torch.zeros(16, dtype=torch.int64)) for k in range(4)]
    with torch.no_grad():
        maps = [model[0](x) for x, _ in batches]
    momentum, weight = model[1].momentum, model[1].weight.clone()
    model[1].running_mean.fill_(99)
    reestimate_batchnorm(model, batches, None, images=64)
    torch.testing.assert_close(model[1].running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0))
    assert model[1].momentum == momentum
    assert torch.equal(model[1].weight, weight)
    assert all(module.training for module in model.modules())


def test_reestimation_is_decided_by_the_seed(digits):
    def statistics(seed, global_seed):
        torch.manual_seed(0)
        model = small_net()
        torch.manual_seed(global_seed)
        reestimate_batchnorm(model, digits.train, digits.preprocess, images=100, seed=seed, batch_size=40)
        return model[1].running_mean

    assert torch.equal(statistics(0, 1), statistics(0, 2))
    assert not torch.equal(statistics(0, 1), statistics(1, 1))


def test_reestimation_without_batchnorm_or_without_images(digits):
    reestimate_batchnorm(nn.Linear(3, 3), digits.train, digits.preprocess)
    with pytest.raises(CoppiceError, match="at least two"):
        reestimate_batchnorm(small_net(), [], None)


def test_reestimation_repairs_wrong_statistics(shared, one_thread):
    preprocess = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    data = load_data(str(shared / "data" / "cifar10" / "test.parquet"), preprocess=preprocess, split_names={"train": "test"})
    model = load_model(f"{shared / 'models.py'}:resnet20", shared / "data" / "weights" / "resnet20_cifar10.safetensors")
    part = data.test.subset(range(500))
    dense = evaluate(model, part, preprocess).top1
    assert dense > 84  # 88.4 on all 10,000
    model.layer2[0].bn1.running_mean += 2
    spoilt = evaluate(model, part, preprocess).top1
    reestimate_batchnorm(model, data.train, preprocess, images=512)
    repaired = evaluate(model, part, preprocess).top1
    assert spoilt < dense - 10
    assert repaired > dense - 4
