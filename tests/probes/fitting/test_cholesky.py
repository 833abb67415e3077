"""Systems of symmetric matrices: as numpy solves them, and refused where rounding leaves no solution."""

import numpy as np
import pytest
import torch

from reasonscope.data.errors import InputError
from reasonscope.probes.fitting import solvers
from reasonscope.probes.fitting.cholesky import Factors, _factored, bordered_solutions, gram, ridged

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.fixture
def features():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((70, 90)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 2, 70])
def test_solutions_are_numpys(features, rows, device):
    matrix = gram(features[:rows].to(device))
    dense = matrix.cpu().numpy()
    np.testing.assert_allclose(dense, features[:rows].numpy() @ features[:rows].numpy().T, rtol=1e-12)
    right, border = features[:2, :rows].to(device)
    penalties = torch.tensor([0.1, 1e4, 3.0], dtype=torch.float64, device=device)
    known = np.append(right.cpu().numpy(), 0)
    for corner in (0.0, float(rows)):
        found, last = bordered_solutions(matrix.clone(), right, border, corner, penalties)
        assert found.shape == (3, rows) and last.shape == (3,)
        for solution, end, penalty in zip(found.cpu().numpy(), last.tolist(), penalties.tolist(), strict=True):
            edge = border.cpu().numpy()[:, None]
            whole = np.block([[dense + penalty * np.eye(rows), edge], [edge.T, np.full((1, 1), corner)]])
            np.testing.assert_allclose(np.append(solution, end), np.linalg.solve(whole, known), rtol=1e-8, atol=1e-12)
    expected = np.linalg.solve(dense + 3 * np.eye(rows), right.cpu().numpy())
    np.testing.assert_allclose(_factored(ridged(matrix.clone(), 3.0))(right).cpu().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_members_of_a_batch_are_renewed_one_by_one(features, device):
    matrices = torch.stack([gram(features[first : first + 5]) for first in (0, 5, 10)]).to(device)
    right, factors = features[:3, :5].to(device), Factors()
    factors.renew(matrices, slice(None))
    torch.testing.assert_close(factors.solve(right), torch.linalg.solve(matrices, right))
    matrices[1] += torch.eye(5, dtype=torch.float64, device=device)
    factors.renew(matrices[[1]], torch.tensor([1], device=device))
    torch.testing.assert_close(factors.solve(right), torch.linalg.solve(matrices, right))
    with pytest.raises(InputError, match="smaller than the rounding"):
        factors.renew(-matrices[[2]], torch.tensor([2], device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_a_penalty_lost_in_rounding_is_refused(features, device):
    indefinite = -gram(features).to(device)
    with pytest.raises(InputError, match="smaller than the rounding"):
        _factored(indefinite.clone())
    with pytest.raises(InputError, match="smaller than the rounding"):
        bordered_solutions(indefinite, *features[:2, :70].to(device), 0, torch.tensor([1.0], dtype=torch.float64))


@pytest.mark.parametrize("path", [solvers.ridge_path, solvers.logistic_path])
def test_two_cores_find_what_one_finds_and_leave_the_threads_as_they_were(features, path):
    labels = (features[:, 0] > 0).to(torch.float64)
    masks = torch.stack([torch.arange(70) % 3 != fold for fold in range(3)])[None]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = path(features[None], labels, [0.1, 10.0], masks)
        torch.set_num_threads(2)
        two = path(features[None], labels, [0.1, 10.0], masks)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
