//! Mixture of experts: gating and routing.

pub mod aux_fi;
mod common_count;
mod common_expanded;
mod common_route;
pub mod expand_to_fused;
pub mod get_fused_mapping;
pub mod group_count;
pub mod inplace_unique_group_indices;
pub mod mask_indices_by_tp;
pub mod moe_topk_gate_backward;
pub mod moe_topk_gate_forward;
pub mod normalize_weight;
pub mod reduce_fused;
pub mod reduce_fused_backward;
pub mod router;
pub mod top2_sum_gate;
pub mod topk_gate;
pub mod topk_sum_and_topk_group_idx;
