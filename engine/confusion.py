"""confusion.py: what a classifier takes for what: the scores of each class, as a table and as a picture.

    per_class, class_table         precision, recall and F1 of each class; with what it is most often mistaken for
    draw_confusion, write_report   the picture alone; what a training leaves of its best epoch

A confusion is counts [K,K]: rows the true class, columns the predicted one.
"""

import csv

import numpy as np

from engine import files, fonts


def per_class(confusion):
    """A confusion -> precision, recall, F1, each [K]; 0 where there is nothing to divide by."""
    hits, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)  # [K] each
    return hits / np.maximum(predicted, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(true + predicted, 1)


def draw_confusion(confusion, classes, path, title):
    """confusion.png: per true style (row) the share of its pictures that is taken for each style, in per cent from 1 % on."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    count = len(classes)
    true = confusion.sum(1)
    share = confusion / np.maximum(true, 1)[:, None]  # [K,K], rows sum to 1
    with fonts.fonts_for("".join((title, *classes))) as note:
        figure, axis = plt.subplots(figsize=(4 + 0.4 * count, 3 + 0.36 * count), layout="constrained")
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for i, j in zip(*np.nonzero(share >= 0.005)):
            axis.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if share[i, j] > 0.5 else "black", in_layout=False)  # inside its cell: nothing to make room for
        axis.set_xticks(range(count), classes, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(count), [f"{name} ({n})" for name, n in zip(classes, true)])
        axis.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="0.9", linewidth=0.5)
        axis.tick_params(which="both", length=0)
        axis.set(xlabel="predicted", ylabel="true (validation pictures)")
        axis.set_title("\n".join(filter(None, (title, note))), loc="left", fontsize=11)
        with files.whole_file(path, "wb") as file:
            figure.savefig(file, format="png", dpi=110)
        plt.close(figure)


def class_table(confusion, classes, trained_on):
    """Lines of per_class.csv: training and validation pictures, precision, recall, F1 and what it is most often mistaken for."""
    lines = [("class", "train", "val", "precision", "recall", "f1", "mistaken_for")]
    wrong = confusion * (1 - np.eye(len(classes), dtype=int))  # [K,K] without the hits
    for k, values in enumerate(zip(*per_class(confusion))):
        other = f"{classes[wrong[k].argmax()]} ({wrong[k].max()})" if wrong[k].any() else ""
        lines.append((classes[k], trained_on[classes[k]], int(confusion[k].sum()), *(f"{value:.3f}" for value in values), other))
    return lines


def write_report(folder, confusion, classes, trained_on, title):
    """confusion.png and per_class.csv in a run folder, and the table on the terminal. trained_on: {class: training pictures}."""
    draw_confusion(confusion, classes, folder / "confusion.png", title)
    lines = class_table(confusion, classes, trained_on)
    with files.whole_file(folder / "per_class.csv") as file:
        csv.writer(file).writerows(lines)
    for name, *numbers, other in lines:
        print(f"{name:28}" + "".join(f"{number:>11}" for number in numbers) + f"   {other}")
