//! Mixture of experts: gating and routing.

mod common_expanded;
pub mod expand_to_fused;
pub mod get_fused_mapping;
pub mod reduce_fused;
pub mod topk_gate;
