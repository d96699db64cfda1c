"""probe.py: how far a frozen network's features go: multinomial logistic regression on them.

    fit_logistic   features and labels -> weight and bias of a last layer
    best_penalty   its penalty, chosen by cross-validation

Capitals in shape comments: N rows, F features, K classes. Everything is float64 on the CPU and a pure function of its arguments.
"""

import numpy as np
import torch
import torch.nn.functional as F

PENALTIES, FOLDS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), 5  # what best_penalty chooses among, and on how many parts of the rows


def row_shares(labels, classes, balance):
    """Weight of each row in the loss, [N], 1 in all: n_c^-balance of a row of class c, of n_c rows."""
    weights = torch.bincount(labels, minlength=classes).double()[labels] ** -balance
    return weights / weights.sum()


def fit_logistic(features, labels, classes, balance, penalty):
    """Multinomial logistic regression: features [N,F], labels [N] -> weight [K,F], bias [K] for the features as they are.

    Minimises the mean cross-entropy, a row of class c weighed by n_c^-balance, plus penalty/2 |weight|^2 on standardised features."""
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)  # [F] each
    x, shares = (features - mean) / std, row_shares(labels, classes, balance)  # [N,F], [N]
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-9)

    def loss():
        solver.zero_grad()
        value = shares @ F.cross_entropy(x @ weight.T + bias, labels, reduction="none") + penalty / 2 * (weight ** 2).sum()
        value.backward()
        return value
    solver.step(loss)
    weight = (weight / std).detach()
    return weight, bias.detach() - weight @ mean


def best_penalty(features, labels, classes, balance, seed):
    """The one of PENALTIES with the lowest mean loss [class-balanced as in fit_logistic] on FOLDS folds of the training rows."""
    fold = torch.empty(len(labels), dtype=torch.long)
    rng = np.random.default_rng([seed, 2])
    for label in range(classes):  # each class spread evenly over the folds
        members = np.flatnonzero(labels.numpy() == label)
        fold[rng.permutation(members)] = torch.from_numpy(rng.permutation(FOLDS)[np.arange(len(members)) % FOLDS])
    shares = row_shares(labels, classes, balance)  # [N]

    def loss(penalty):
        total = 0.0
        for n in range(FOLDS):
            seen, held = fold != n, fold == n
            weight, bias = fit_logistic(features[seen], labels[seen], classes, balance, penalty)
            total += (shares[held] * F.cross_entropy(features[held] @ weight.T + bias, labels[held], reduction="none")).sum().item()
        return total
    return min(PENALTIES, key=loss)
