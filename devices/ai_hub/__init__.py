"""The farm: a bundle's NPU graphs on the hosted devices of Qualcomm AI Hub, through its own client, qai-hub."""
