"""J = ½ Σ_ij A_ij ‖u_i − u_j‖² + λ/2 Σ_i ‖u_i − f_i‖², without a T×T array."""

from gaugekit.ops.nonlocal_energy.operator import nonlocal_energy

__all__ = ["nonlocal_energy"]
