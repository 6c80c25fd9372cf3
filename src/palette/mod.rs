//! Palettes: k-means, differentiable k-means, packing, the palettized checkpoint.
