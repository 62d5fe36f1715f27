//! Manifold-constrained hyper-connections: `m` residual streams per token, mixed by small matrices.

pub mod mhc_post_fwd;

pub use mhc_post_fwd::mhc_post_fwd;
