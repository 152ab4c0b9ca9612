"""Names of the GPUs and drivers that Vulkan lists: onnxruntime's device list has numbers of the vendor and the model.

Source of the structures: Khronos' Vulkan specification, "Physical Device Enumeration" (vulkan_core.h).
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

PROPERTIES_2, DRIVER_PROPERTIES = 1_000_059_001, 1_000_196_000
APPLICATION_INFO, INSTANCE_CREATE_INFO = 0, 1
VULKAN_1_2 = (1 << 22) | (2 << 12)
KINDS = ("other", "integrated", "discrete", "virtual", "cpu")


class _Application(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_uint32),
        ("engine", ctypes.c_char_p),
        ("engine_version", ctypes.c_uint32),
        ("api_version", ctypes.c_uint32),
    )


class _InstanceInfo(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.POINTER(_Application)),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    )


class _Driver(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("id", ctypes.c_uint32),
        ("name", ctypes.c_char * 256),
        ("info", ctypes.c_char * 256),
        ("conformance", ctypes.c_uint8 * 4),
    )


class _Properties(ctypes.Structure):
    """VkPhysicalDeviceProperties2; what follows the name (limits) is room that is not read."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("api_version", ctypes.c_uint32),
        ("driver_version", ctypes.c_uint32),
        ("vendor_id", ctypes.c_uint32),
        ("device_id", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("name", ctypes.c_char * 256),
        ("rest", ctypes.c_uint8 * 4096),
    )


def vulkan_devices() -> list[dict[str, Any]]:
    """name, kind (discrete, integrated, virtual, cpu, other), vendor_id, device_id, driver and driver_version of each
    device; empty where there is no Vulkan loader or no driver."""
    try:
        vulkan = ctypes.CDLL("vulkan-1.dll" if sys.platform == "win32" else "libvulkan.so.1")
        create, enumerate_devices = vulkan.vkCreateInstance, vulkan.vkEnumeratePhysicalDevices
        properties_of, destroy = vulkan.vkGetPhysicalDeviceProperties2, vulkan.vkDestroyInstance
    except (OSError, AttributeError):  # no loader, or one of Vulkan 1.0
        return []
    enumerate_devices.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    properties_of.argtypes = destroy.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    application = _Application(type=APPLICATION_INFO, api_version=VULKAN_1_2)
    info = _InstanceInfo(type=INSTANCE_CREATE_INFO, application=ctypes.pointer(application))
    instance = ctypes.c_void_p()
    if create(ctypes.byref(info), None, ctypes.byref(instance)) != 0:
        return []
    try:
        count = ctypes.c_uint32()
        enumerate_devices(instance, ctypes.byref(count), None)
        handles = (ctypes.c_void_p * count.value)()
        enumerate_devices(instance, ctypes.byref(count), handles)
        return [_describe(properties_of, handle) for handle in handles[: count.value]]
    finally:
        destroy(instance, None)


def _describe(properties_of: Any, device: int | None) -> dict[str, Any]:
    driver = _Driver(type=DRIVER_PROPERTIES)
    found = _Properties(type=PROPERTIES_2, next=ctypes.cast(ctypes.pointer(driver), ctypes.c_void_p))
    properties_of(device, ctypes.byref(found))
    return {
        "name": found.name.decode(errors="replace"),
        "kind": KINDS[found.kind] if found.kind < len(KINDS) else "other",
        "vendor_id": found.vendor_id,
        "device_id": found.device_id,
        "driver": driver.name.decode(errors="replace"),
        "driver_version": driver.info.decode(errors="replace"),
    }
