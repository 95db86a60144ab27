import numpy as np


def amount_ratio(amount, average):
    return amount / np.maximum(average.astype(np.float64), 0.01)


def over_max(amount, largest):
    return (amount > largest).astype(np.float64)


def night(hour):
    return np.cos(hour * np.pi / 12.0)
