"""How many freedoms a model has, of whatever kind: the rank that its Jacobian lacks."""

import torch


def nullity(model, read, output, monkeypatch):
    """That of the Jacobian of ``output(model(**read))`` with respect to every parameter; float64, eager attention."""
    softmax = torch.nn.functional.softmax  # eager attention takes it in float32
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))
    model.set_attn_implementation("eager")
    parameters = {path: parameter.detach() for path, parameter in model.named_parameters()}
    sizes = [parameter.numel() for parameter in parameters.values()]

    def outputs(flat):
        pieces = zip(parameters, flat.split(sizes), parameters.values(), strict=True)
        moved = {path: piece.view_as(parameter) for path, piece, parameter in pieces}
        return output(torch.func.functional_call(model, moved, kwargs=read)).flatten()

    flat = torch.cat([parameter.flatten() for parameter in parameters.values()])
    spectrum = torch.linalg.svdvals(torch.func.jacfwd(outputs)(flat))
    return int((spectrum < 1e-12 * spectrum[0]).sum())
