"""The switched CIFAR ResNet, its gates and low-rank layers; cascades; networks of users.

Nothing here knows of training or pruning.
"""

from models.build import CASCADE, build_network
from models.cascade import Cascade, Member
from models.decisions import all_on, sampled, straight_through, thresholded
from models.lowrank import LOW_RANK, LowRankConv2d, LowRankLinear, low_rank, replace_layer
from models.own import OwnNetwork, allow, is_own, kind_of, picked_logits
from models.resnet import GATES, NETWORKS, ResNet, RoutedOutput, check_depth
