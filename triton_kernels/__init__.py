"""Triton kernels of gaugekit, one file a stem; each imports torch and triton only.

Installed as ``gaugekit.triton_kernels``. OpenAI ships a package called ``triton_kernels`` that inference servers
look for by a trial import; a checkout of this repository on ``sys.path`` must not be mistaken for it.
"""

if __name__ == "triton_kernels":
    raise ImportError("this is gaugekit's source folder; import gaugekit.triton_kernels instead")
