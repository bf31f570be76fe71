// A container image in one file, in the form of `docker save` (image-spec v1.2 of Docker):
// manifest.json names the configuration and the layers, which are tar files beside it. Podman,
// `ctr images import` and `docker load` read it.
import {
  chmod,
  copyFile,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rm,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { $ } from 'zx'
import { architecture } from '../kubernetes/program-cache.mts'
import { hash } from './layer-cache.mts'

export interface Image extends Process {
  /** Its full name, with registry and tag. */
  tag: string
  /** By path without leading slash. */
  files: Readonly<Record<string, ImageFile>>
}

interface Process {
  /** Runs with the pod's arguments, or those of `command` when it has none. */
  entrypoint?: readonly string[]
  command?: readonly string[]
  /** User and group id by number, as Kubernetes cannot tell whether a name is root's. */
  user?: number
}

/**
 * A copy of a program of this computer, a symbolic link or a small text. `capabilities`: the program's
 * file capabilities, as setcap takes them.
 */
export type ImageFile =
  | { program: string; capabilities?: string }
  | { link: string }
  | { text: string }

/**
 * Writes the archive of an image with one layer, for this computer's architecture. The same image
 * gives the same archive.
 */
export async function writeDockerArchive(image: Image, archive: string): Promise<void> {
  const scratch = await mkdtemp(`${archive}.`)
  const [tree, parts] = [join(scratch, 'tree'), join(scratch, 'parts')]
  try {
    await Promise.all([mkdir(tree), mkdir(parts)])
    const capabilities: string[] = []
    for (const [path, file] of Object.entries(image.files)) {
      await place(file, join(tree, path))
      if ('program' in file && file.capabilities) capabilities.push(file.capabilities, path)
    }
    await tar(tree, join(parts, 'layer.tar'), capabilities)
    await packImage(parts, [image.tag], archive, image)
  } finally {
    await rm(scratch, { recursive: true })
  }
}

/**
 * Writes the archive of an image whose one layer exists already.
 *
 * @param parts folder with layer.tar and nothing else
 */
export async function packImage(
  parts: string,
  tags: readonly string[],
  archive: string,
  process: Process = {},
): Promise<void> {
  const layer = hash(await readFile(join(parts, 'layer.tar')))
  const config = `${JSON.stringify(configuration(process, layer))}\n`
  const manifest = { Config: 'config.json', RepoTags: tags, Layers: ['layer.tar'] }
  await writeFile(join(parts, 'config.json'), config)
  await writeFile(join(parts, 'manifest.json'), `${JSON.stringify([manifest])}\n`)
  await tar(parts, archive)
}

async function place(file: ImageFile, path: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true })
  if ('link' in file) return symlink(file.link, path)
  if ('text' in file) return writeFile(path, file.text)
  await copyFile(file.program, path)
  await chmod(path, 0o755)
}

/**
 * Everything in it belongs to root and may be read by all. Uncompressed: unpacking is quicker.
 *
 * @param capabilities of files in the folder, as arguments of setcap
 */
async function tar(folder: string, file: string, capabilities: string[] = []): Promise<void> {
  const same = ['--sort=name', '--mtime=@0', '--owner=0', '--group=0', '--numeric-owner']
  const mode = '--mode=u+rwX,go+rX,go-w'
  const names = (await readdir(folder)).sort()
  const run = $({ quiet: true, cwd: folder, stdio: ['inherit', 'pipe', 'pipe'] })
  if (capabilities.length === 0) {
    await run`tar --format=ustar ${same} ${mode} -cf ${file} ${names}`
    return
  }
  // File capabilities are extended attributes that only root may set; tar's file is the caller's.
  const sudo = process.getuid?.() === 0 ? [] : ['sudo']
  const attributes = ['--format=posix', '--xattrs', '--xattrs-include=security.capability']
  // Without the number of the process and the times of access that would differ.
  const headers = '--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime'
  await run`${sudo} sh -c 'PATH=$PATH:/sbin:/usr/sbin; setcap "$@"' sh ${capabilities} && ${sudo} tar ${attributes} ${headers} ${same} ${mode} -cf - ${names} >${file}`
}

/** @param layer SHA-256 of the layer's tar file */
function configuration({ entrypoint, command, user }: Process, layer: string): object {
  return {
    architecture,
    os: 'linux',
    config: {
      Env: ['PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'],
      Entrypoint: entrypoint,
      Cmd: command,
      WorkingDir: '/',
      ...(user === undefined ? {} : { User: `${user}:${user}` }),
    },
    rootfs: { type: 'layers', diff_ids: [`sha256:${layer}`] },
    history: [{ created: '1970-01-01T00:00:00Z', created_by: 'the rehearsal' }],
  }
}
