// One value at a time out of file and environment, with every problem noted where it stands.
import type { Assignment } from './env-file.mts'
import type { Settings, variables } from './variables.mts'

/** Reads and checks values; what is wrong is collected in `problems`, not thrown. */
export class SettingsReader {
  readonly problems: string[] = []
  private readonly assignments: Map<string, Assignment>
  private readonly env: Readonly<Record<string, string | undefined>>

  constructor(
    assignments: readonly Assignment[],
    env: Readonly<Record<string, string | undefined>>,
  ) {
    this.assignments = new Map(assignments.map((assignment) => [assignment.name, assignment]))
    this.env = env
  }

  /** A variable's text as the environment, or else the file, has it. */
  text(name: string): string | undefined {
    return this.env[name] ?? this.assignments.get(name)?.value
  }

  /** Notes a problem of a variable, with the place its value comes from. */
  problem(name: string, reason: string): void {
    this.problems.push(`${this.place(name)}: ${name} ${reason}`)
  }

  /** The value of one variable; undefined, and a problem noted, if it is wrong or missing. */
  read<T>(
    name: string,
    kind: { parse(text: string): T | undefined; expects: string },
    otherwise?: T,
  ): T | undefined {
    const text = this.text(name)
    if (text === undefined) {
      if (otherwise === undefined) this.problem(name, 'is missing')
      return otherwise
    }
    const value = kind.parse(text)
    if (value === undefined) this.problem(name, `is "${text}", not ${kind.expects}`)
    return value
  }

  /**
   * The values of a table of variables. Those that are wrong are missing from the result: it is
   * of use only once `problems` is known to be empty.
   */
  readAll(table: typeof variables): Settings {
    const values = Object.entries(table).map(([name, variable]) => {
      const otherwise = 'otherwise' in variable ? variable.otherwise : undefined
      return [name, this.read<unknown>(name, variable.kind, otherwise)]
    })
    return Object.fromEntries(values) as Settings
  }

  private place(name: string): string {
    if (this.env[name] !== undefined) return 'environment'
    const line = this.assignments.get(name)?.line
    return line ? `cluster.env:${line}` : 'cluster.env'
  }
}
