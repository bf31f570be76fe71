// The CD image, laid out as the NixOS installer's: GRUB for UEFI with its configuration, kernel
// and ramdisk at store paths, and the layers.
import { copyFile, link, mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { $ } from 'zx'
import type { DebianLayer } from './debian-layer.mts'
import { cached, contentOf } from './layer-cache.mts'
import { type OwnLayer, storePath } from './own-layer.mts'

const grub = {
  x64: { platform: 'x86_64-efi', image: 'BOOTX64.EFI' },
  arm64: { platform: 'arm64-efi', image: 'BOOTAA64.EFI' },
}[process.arch === 'arm64' ? 'arm64' : 'x64']

/**
 * @param layers further squashfs files; each is mounted at /nix/.layers/ and its name
 * @returns the path of the image
 */
export async function isoImage(
  debian: DebianLayer,
  own: OwnLayer,
  layers: readonly string[],
  release: string,
): Promise<string> {
  const name = `${own.label}.iso`
  const configuration = await readFile(join(import.meta.dirname, 'machine', 'grub.cfg'), 'utf8')
  // An entry of the cache never changes, so its name stands for what is in it.
  const inputs = [
    debian.image,
    own.image,
    ...layers,
    configuration,
    await contentOf(import.meta.filename),
  ]
  const folder = await cached('iso', inputs, async (into) => {
    const tree = join(into, 'tree')
    const kernel = storePath(`linux-${debian.kernelVersion}`, debian.kernel)
    const ramdisk = storePath(`initrd-linux-${debian.kernelVersion}`, own.ramdisk)
    const bootFiles = {
      [`boot${kernel}/bzImage`]: debian.kernel,
      [`boot${ramdisk}/initrd`]: own.ramdisk,
    }
    for (const layer of [debian.image, own.image, ...layers]) {
      bootFiles[`layers/${basename(layer)}`] = layer
    }
    for (const [path, source] of Object.entries(bootFiles)) {
      await mkdir(join(tree, path, '..'), { recursive: true })
      await link(source, join(tree, path)).catch(() => copyFile(source, join(tree, path)))
    }
    const values: Record<string, string> = {
      title: `NixOS ${release}.stand-in Installer`,
      // With the doubled slash that the real one has.
      kernel: `/boot/${kernel}/bzImage`,
      ramdisk: `/boot/${ramdisk}/initrd`,
      parameters: `init=${own.init} root=LABEL=${own.label} mitigations=off no_timer_check panic=5`,
    }
    const grubConfig = configuration.replaceAll(/@([a-z]+)@/g, (_, key) => values[key] ?? '')
    await mkdir(join(tree, 'EFI', 'BOOT'), { recursive: true })
    await writeFile(join(tree, 'EFI', 'BOOT', 'grub.cfg'), grubConfig)
    await writeFile(join(tree, 'EFI', 'nixos-installer-image'), '')
    await writeFile(join(tree, 'version.txt'), `${release}.stand-in\n`)
    await efiImage(tree)

    const efi = ['-eltorito-alt-boot', '-e', 'boot/efi.img', '-no-emul-boot']
    await $({
      quiet: true,
    })`xorriso -as mkisofs -quiet -volid ${own.label} -R -J -joliet-long ${efi} -o ${join(into, name)} ${tree}`
    await rm(tree, { recursive: true })
  })
  return join(folder, name)
}

/** boot/efi.img: the FAT file system that UEFI finds on the CD, with GRUB in it. */
async function efiImage(tree: string): Promise<void> {
  const efi = join(tree, 'EFI', 'BOOT', grub.image)
  const modules =
    'fat iso9660 part_gpt part_msdos normal boot linux configfile search search_label search_fs_file all_video gfxterm efi_gop test echo serial halt'
  const run = $({ quiet: true, env: { ...process.env, MTOOLS_SKIP_CHECK: '1' } })
  await run`grub-mkimage -O ${grub.platform} -p /EFI/BOOT -o ${efi} ${modules.split(' ')}`
  const image = join(tree, 'boot', 'efi.img')
  await run`mformat -C -i ${image} -f 2880 -v EFIBOOT ::`
  await run`mmd -i ${image} ::EFI ::EFI/BOOT`
  await run`mcopy -i ${image} ${efi} ${join(tree, 'EFI', 'BOOT', 'grub.cfg')} ::EFI/BOOT/`
}
