"""A layer seen as a matrix: patches times weight are the layer's results, whatever the layer is. A program stops anywhere and goes on."""

import pytest
import torch
from torch import Tensor, nn

from coppice.errors import CoppiceError
from coppice.torch.layers import find_layers
from coppice.torch.program import Program, of_one_shape

LAYERS = {
    "conv": (nn.Conv2d(6, 8, 3), (6, 9, 7)),
    "strided, padded, dilated": (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)), (6, 9, 7)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2, padding=1), (6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, bias=False), (6, 5, 5)),
    "conv1d": (nn.Conv1d(4, 6, 5, stride=2, padding=2), (4, 11)),
    "conv3d": (nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), (2, 3, 5, 5)),
    "linear": (nn.Linear(7, 5), (7,)),
    "linear on tokens": (nn.Linear(7, 5, bias=False), (9, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_the_matrix_are_the_responses(name: str) -> None:
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    module = module.double()
    program = Program(module, [torch.randn(3, *shape, dtype=torch.float64)])
    (layer,) = find_layers(program)
    program.advance(layer.index)
    x = program.value(layer.input, 0)
    out_shape = program.values[layer.output].shape
    at = torch.randperm(layer.positions(out_shape))[:4]
    features = layer.features(x, at, out_shape[2:])
    program.advance(layer.index + 1)
    want = layer.responses(program.value(layer.output, 0), at)
    have = features @ layer.matrix(module.weight.detach()).transpose(1, 2)
    if module.bias is not None:
        have = have + module.bias.view(layer.groups, 1, -1)
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)
    assert torch.equal(layer.weight_from(layer.matrix(module.weight), module.weight), module.weight)


class Branches(nn.Module):
    """In-place ops, a residual sum, a weight that is read twice, and maps that get smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.shared = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.shared(x)
        y += x
        y = self.shared(nn.functional.max_pool2d(torch.relu_(y), 4))
        scores: Tensor = self.head(y.mean((2, 3)))
        return scores


@pytest.mark.parametrize("memory", [1, 150_000, 2**30])
def test_a_program_gives_what_the_model_gives_wherever_it_stops(memory: int) -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    batches = [torch.randn(2, 3, 16, 16) for _ in range(5)]
    program = Program(model, batches, memory)
    seen = []
    for stop in range(0, len(program.ops) + 1, 3):
        program.advance(stop)
        seen.append(program.active)
        for batch, out in zip(batches, program.finish(), strict=False):
            torch.testing.assert_close(out, model(batch).detach())
    assert seen == sorted(seen)
    assert seen[0] == {1: 2, 150_000: 3, 2**30: 5}[memory]
    assert memory != 100_000 or seen[-1] == 5  # small maps: all take part


def test_a_weight_that_is_read_twice_is_no_layer_and_a_norm_belongs_to_its_layer() -> None:
    layers = find_layers(Program(Branches().eval(), [torch.randn(2, 3, 16, 16)]))
    assert [layer.weight for layer in layers] == ["stem.0.weight", "head.weight"]
    assert layers[0].norm is not None
    assert layers[0].norm.mean == "stem.1.running_mean"
    assert layers[1].norm is None


def test_batches_of_another_shape_are_left_out_and_none_at_all_is_said() -> None:
    assert len(of_one_shape([torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(1, 3)])) == 2
    with pytest.raises(CoppiceError, match="no calibration batches"):
        of_one_shape([])
