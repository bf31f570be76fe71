// Programs that tests compare with.
import { which } from 'zx/core'

/** Why a test cannot run here, for its `skip`; false if all of the programs are there. */
export function missing(...programs: string[]): string | false {
  const absent = programs.filter((program) => !which.sync(program, { nothrow: true }))
  return absent.length > 0 && `not installed: ${absent.join(', ')}`
}
