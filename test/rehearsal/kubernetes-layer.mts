// The layer of the Kubernetes programs, when there are any: kept apart, as they are large and
// change with nothing else.
import { readdir, realpath, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { $ } from 'zx'
import { StepError } from '../../lib/errors.mts'
import { cached } from './layer-cache.mts'

/**
 * A squashfs with the programs in its bin/. They go before those of Debian of the same name, so
 * that a newer etcd may be among them.
 *
 * @param folders whose files are the programs
 * @throws StepError when a folder is not there or has a file that cannot be run
 */
export async function kubernetesLayer(folders: readonly string[]): Promise<string> {
  const programs: string[] = []
  const inputs: string[] = []
  for (const folder of folders) {
    const names = await readdir(folder).catch(() => {
      throw new StepError(`there is no folder of Kubernetes programs ${folder}`)
    })
    for (const name of names.sort()) {
      const path = await realpath(join(folder, name))
      const { mode, size, mtimeMs } = await stat(path)
      if (!(mode & 0o111)) throw new StepError(`${path} is no program that can be run`)
      programs.push(path)
      // Half a gigabyte: who changes one changes its time.
      inputs.push(`${path} ${size} ${mtimeMs}`)
    }
  }
  const folder = await cached('kubernetes', inputs, async (into) => {
    const options = ['-quiet', '-no-progress', '-all-root', '-comp', 'lz4', '-keep-as-directory']
    // As pseudo files: no copy of them is made first.
    const pseudo = programs.flatMap((path) => [
      '-p',
      `bin/${path.split('/').at(-1)} f 755 0 0 cat '${path}'`,
    ])
    const empty = join(into, 'bin')
    await $({ quiet: true })`mkdir ${empty}`
    await $({
      quiet: true,
    })`mksquashfs ${empty} ${join(into, 'kubernetes.squashfs')} ${options} ${pseudo}`
    await $({ quiet: true })`rmdir ${empty}`
  })
  return join(folder, 'kubernetes.squashfs')
}
