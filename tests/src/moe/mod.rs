//! Mixture of experts: gating and routing.

pub mod get_fused_mapping;
pub mod topk_gate;
