"""Figures that compare a prediction with the truth.

`trackpl.metrics.tapvid` scores point tracks as TAP-Vid does, `trackpl.metrics.flow` optical flow as KITTI and
Sintel do, `trackpl.metrics.segmentation` masks as DAVIS, `trackpl.metrics.pose` joints as JHMDB. Each has
plain functions that score items one by one, in float64, and a torchmetrics class that averages them over all
items of all processes. Every average is over items (videos, image pairs), never over batches, so that neither
batch size nor the number of processes changes a figure. A ratio 0/0 is NaN and left out of the average.
"""
