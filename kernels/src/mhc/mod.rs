//! Manifold-constrained hyper-connections: `m` residual streams per token, mixed by small matrices.
