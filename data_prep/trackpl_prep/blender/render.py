"""Draws the frames of a scene: Blender's Cycles on the CPU, one thread, a fixed seed.

Blender is one global state, so this belongs into a process of its own (`child`), one scene a process. What made it
fast enough: one bounce and then Cycles' fast global illumination; no light tree for two or three lamps; no light
sampling of the glowing dome; few samples and a denoiser that is given albedo and normals.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trackpl.errors import DataError
from trackpl_prep.blender import INSTALL
from trackpl_prep.blender.physics import continuous
from trackpl_prep.blender.scene import NEAR, Item, Lamp, Scene

_TARGET = 0.46  # median of the frames' sRGB luminance that the exposure aims at
_FLIP = np.diag([1.0, -1.0, -1.0])  # our camera looks along +z with y down, Blender's along -z with y up


def blender() -> Any:
    """Return the module `bpy`; raises `DataError` that says how to get it."""
    try:
        with _one_processor():
            import bpy
    except ImportError as error:
        raise DataError(f"kubric-blender needs Blender as the module 'bpy' ({error}); {INSTALL}") from None
    return bpy


@contextmanager
def _one_processor() -> Iterator[None]:
    """Let a module that counts the processors find one.

    Blender's thread pool has as many threads as it finds on import, whatever the scene says later; with one thread to
    draw, the others at times only spin and take the time of a whole processor each. The pixels are the same.
    """
    if not hasattr(os, "sched_setaffinity"):  # not on this system
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def render(
    scene: Scene,
    size: tuple[int, int],
    folder: Path,
    *,
    samples: int = 16,
    passes: bool = False,
    after_frame: Callable[[int], None] | None = None,
) -> NDArray[np.uint8]:
    """Draw all frames of a scene: (T, H, W, 3) uint8 sRGB.

    Args:
        scene: what to draw.
        size: (H, W) pixels.
        folder: an empty folder for what Blender reads and writes.
        samples: light paths a pixel.
        passes: let Blender also write the depth and the object (0, 1, .. of the scene's items, plus 1) of each pixel
            into `folder`, for checks of our own truth: `depth0001.exr`, `item0001.exr`, ... of the first sample.
        after_frame: is called with the number of each frame that is done.

    Raises:
        DataError: Blender is not installed.
    """
    bpy = blender()
    bpy.ops.wm.read_factory_settings(use_empty=True)
    _settings(bpy, size, samples)
    for k, item in enumerate(scene.items):
        _surface(bpy, scene, k, item, folder)
    for lamp in scene.lamps:
        _lamp(bpy, lamp)
    _sky(bpy, scene)
    _camera(bpy, scene)
    frames = len(scene.times) - 2
    _expose(bpy, frames, folder)
    _shutter(bpy, scene)
    if passes:
        _passes(bpy, folder)
    out = np.empty((frames, *size, 3), np.uint8)
    for t in range(frames):
        out[t] = _draw(bpy, t, folder / f"{t:04d}.png")
        if after_frame:
            after_frame(t)
    return out


def _settings(bpy: Any, size: tuple[int, int], samples: int) -> None:
    """Set what does not depend on the scene."""
    scene = bpy.context.scene
    render, cycles = scene.render, scene.cycles
    render.engine = "CYCLES"
    render.resolution_y, render.resolution_x = size
    render.resolution_percentage = 100
    render.threads_mode, render.threads = "FIXED", 1
    render.use_persistent_data = True
    render.image_settings.file_format, render.image_settings.color_mode = "PNG", "RGB"
    render.image_settings.compression = 0
    render.dither_intensity = 0
    render.film_transparent = False
    scene.view_settings.view_transform = "Standard"
    scene.display_settings.display_device = "sRGB"
    cycles.device, cycles.seed, cycles.use_animated_seed = "CPU", 0, True
    cycles.samples, cycles.use_adaptive_sampling = samples, False
    cycles.use_light_tree = False
    cycles.max_bounces = cycles.diffuse_bounces = cycles.glossy_bounces = 1
    cycles.transmission_bounces = cycles.transparent_max_bounces = cycles.volume_bounces = 0
    cycles.caustics_reflective = cycles.caustics_refractive = False
    cycles.sample_clamp_indirect = 4.0
    cycles.use_fast_gi, cycles.fast_gi_method = True, "REPLACE"
    cycles.ao_bounces = cycles.ao_bounces_render = 1
    cycles.use_denoising, cycles.denoiser = True, "OPENIMAGEDENOISE"
    cycles.denoising_input_passes, cycles.denoising_prefilter = "RGB_ALBEDO_NORMAL", "FAST"


def _surface(bpy: Any, scene: Scene, k: int, item: Item, folder: Path) -> None:
    """Add one surface with its material and motion."""
    mesh = bpy.data.meshes.new(f"{item.kind}{k}")
    faces = item.mesh.faces
    mesh.vertices.add(len(item.mesh.vertices))
    mesh.vertices.foreach_set("co", item.mesh.vertices.astype(np.float32).ravel())
    mesh.loops.add(faces.size)
    mesh.loops.foreach_set("vertex_index", faces.astype(np.int32).ravel())
    mesh.polygons.add(len(faces))
    mesh.polygons.foreach_set("loop_start", np.arange(0, faces.size, 3, dtype=np.int32))
    mesh.update(calc_edges=True)
    mesh.polygons.foreach_set("use_smooth", np.full(len(faces), item.mesh.smooth))
    mesh.uv_layers.new(name="uv").data.foreach_set("uv", item.mesh.uv.astype(np.float32).ravel())
    mesh.materials.append(_material(bpy, k, item, folder))
    thing = bpy.data.objects.new(mesh.name, mesh)
    thing.pass_index = k + 1
    if item.material.glow:  # the light from all sides comes through
        thing.visible_diffuse = thing.visible_shadow = thing.visible_transmission = False
    bpy.context.collection.objects.link(thing)
    thing.rotation_mode = "QUATERNION"
    if item.label:
        _animate(thing, "location", scene.places[:, k])
        _animate(thing, "rotation_quaternion", scene.turns[:, k])


def _animate(thing: Any, path: str, values: NDArray[np.float64]) -> None:
    """Give a property its values (T + 2, C) at frames -1 to T, straight lines between them."""
    for t, value in enumerate(values):
        setattr(thing, path, value.tolist())
        thing.keyframe_insert(path, frame=t - 1)
    for curve in thing.animation_data.action.fcurves:
        for key in curve.keyframe_points:
            key.interpolation = "LINEAR"


def _material(bpy: Any, k: int, item: Item, folder: Path) -> Any:
    """Make a material whose texture sticks to the surface."""
    path = folder / f"texture{k}.png"
    Image.fromarray(item.material.texture).save(path, compress_level=1)
    material = bpy.data.materials.new(f"material{k}")
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    nodes.clear()
    texture = nodes.new("ShaderNodeTexImage")
    texture.image = bpy.data.images.load(str(path))
    texture.extension = "MIRROR"
    out = nodes.new("ShaderNodeOutputMaterial")
    if item.material.glow:
        shader = nodes.new("ShaderNodeEmission")
        shader.inputs["Strength"].default_value = item.material.glow
        links.new(texture.outputs["Color"], shader.inputs["Color"])
        links.new(shader.outputs[0], out.inputs["Surface"])
        material.cycles.emission_sampling = "NONE"
        return material
    shader = nodes.new("ShaderNodeBsdfPrincipled")
    shader.inputs["Roughness"].default_value = item.material.roughness
    shader.inputs["Metallic"].default_value = item.material.metallic
    links.new(texture.outputs["Color"], shader.inputs["Base Color"])
    links.new(shader.outputs[0], out.inputs["Surface"])
    return material


def _lamp(bpy: Any, lamp: Lamp) -> None:
    from mathutils import Vector  # comes with bpy

    data = bpy.data.lights.new("lamp", "SUN" if lamp.far else "AREA")
    data.energy, data.color = lamp.power, lamp.colour.tolist()
    if lamp.far:
        data.angle = lamp.size
    else:
        data.shape, data.size = "SQUARE", lamp.size
    thing = bpy.data.objects.new("lamp", data)
    thing.location = lamp.place.tolist()
    thing.rotation_mode = "QUATERNION"
    thing.rotation_quaternion = Vector((-lamp.place).tolist()).to_track_quat("-Z", "Y")
    # Lamps themselves are not in the truth: the camera must not see them.
    thing.visible_camera = False
    bpy.context.collection.objects.link(thing)


def _sky(bpy: Any, scene: Scene) -> None:
    """Light from all sides, of one colour."""
    world = bpy.data.worlds.new("world")
    bpy.context.scene.world = world
    world.use_nodes = True
    background = world.node_tree.nodes["Background"]
    background.inputs["Color"].default_value = (*scene.sky.tolist(), 1.0)
    background.inputs["Strength"].default_value = 1.0
    world.cycles.sampling_method = "MANUAL"
    world.cycles.sample_map_resolution = 128
    world.light_settings.distance = 6.0


def _camera(bpy: Any, scene: Scene) -> None:
    from mathutils import Matrix

    data = bpy.data.cameras.new("camera")
    data.sensor_fit, data.sensor_width = "HORIZONTAL", 36.0
    data.lens = 36.0 * scene.focal
    data.clip_start, data.clip_end = NEAR, 1000.0
    thing = bpy.data.objects.new("camera", data)
    thing.rotation_mode = "QUATERNION"
    bpy.context.collection.objects.link(thing)
    bpy.context.scene.camera = thing
    turns = np.array([list(Matrix((turn @ _FLIP).tolist()).to_quaternion()) for turn in scene.camera_turn])
    _animate(thing, "location", scene.camera_place)
    _animate(thing, "rotation_quaternion", continuous(turns))


def _draw(bpy: Any, frame: int, path: Path) -> NDArray[np.uint8]:
    scene = bpy.context.scene
    scene.frame_set(frame)
    scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)
    with Image.open(path, formats=["PNG"]) as image:
        pixels = np.array(image.convert("RGB"))
    path.unlink()
    return pixels


def _expose(bpy: Any, frames: int, folder: Path) -> None:
    """Set one exposure for the clip, from previews of its first and last frame, so that the median is a mid grey."""
    scene = bpy.context.scene
    before = scene.cycles.samples, scene.render.resolution_percentage, scene.cycles.use_denoising
    scene.cycles.samples, scene.render.resolution_percentage, scene.cycles.use_denoising = 2, 25, False
    for _ in range(2):  # a second time, for what the first had cut off
        shots = [_draw(bpy, t, folder / "preview.png") for t in (0, frames - 1)]
        grey = np.median([shot @ np.array([0.2126, 0.7152, 0.0722]) for shot in shots]) / 255
        stops = np.log2(_linear(_TARGET) / _linear(float(np.clip(grey, 0.01, 0.99))))
        exposure = scene.view_settings.exposure + float(np.clip(stops, -4, 4))
        scene.view_settings.exposure = float(np.clip(exposure, -8, 8))
    scene.cycles.samples, scene.render.resolution_percentage, scene.cycles.use_denoising = before


def _linear(grey: float) -> float:
    return grey / 12.92 if grey <= 0.04045 else ((grey + 0.055) / 1.055) ** 2.4


def _shutter(bpy: Any, scene: Scene) -> None:
    if scene.shutter:
        render = bpy.context.scene.render
        render.use_motion_blur, render.motion_blur_shutter = True, scene.shutter
        render.motion_blur_position = "CENTER"


def _passes(bpy: Any, folder: Path) -> None:
    """Have depth and object numbers written beside each frame."""
    scene = bpy.context.scene
    layer = scene.view_layers[0]
    layer.use_pass_z = layer.use_pass_object_index = True
    scene.use_nodes = True
    tree = scene.node_tree
    tree.nodes.clear()
    source = tree.nodes.new("CompositorNodeRLayers")
    tree.links.new(source.outputs["Image"], tree.nodes.new("CompositorNodeComposite").inputs[0])
    for name, output in (("depth", "Depth"), ("item", "IndexOB")):
        file = tree.nodes.new("CompositorNodeOutputFile")
        file.base_path = str(folder)
        file.format.file_format, file.format.color_depth, file.format.color_mode = "OPEN_EXR", "32", "RGB"
        file.file_slots[0].path = f"{name}####"
        tree.links.new(source.outputs[output], file.inputs[0])


def read_pass(path: Path, size: tuple[int, int]) -> NDArray[np.float32]:
    """Read what `passes` wrote: (H, W) float32."""
    image = blender().data.images.load(str(path))
    pixels = np.empty(size[0] * size[1] * image.channels, np.float32)
    image.pixels.foreach_get(pixels)
    return pixels.reshape(*size, image.channels)[::-1, :, 0].copy()
