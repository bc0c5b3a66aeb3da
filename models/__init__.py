"""The switched CIFAR ResNet, its gates and its low-rank layers.  Nothing here knows of training or pruning."""

from models.build import CASCADE, build_network
from models.cascade import Cascade, Member
from models.decisions import all_on, sampled, straight_through, thresholded
from models.lowrank import LOW_RANK, LowRankConv2d, LowRankLinear, low_rank
from models.resnet import GATES, NETWORKS, ResNet, RoutedOutput, check_depth

__all__ = [
    "CASCADE",
    "GATES",
    "LOW_RANK",
    "NETWORKS",
    "Cascade",
    "LowRankConv2d",
    "LowRankLinear",
    "Member",
    "ResNet",
    "RoutedOutput",
    "all_on",
    "build_network",
    "check_depth",
    "low_rank",
    "sampled",
    "straight_through",
    "thresholded",
]
