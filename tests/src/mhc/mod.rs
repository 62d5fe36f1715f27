//! Hyper-connections.

pub mod mhc_post_fwd;
