// The fault table as the page docs/faults.md.
import type { Fault } from './fault.mts'

const introduction = `# Faults

What can go wrong, and what holds afterwards. \`npm run test:faults\` causes each fault for real and checks what its row states. Without arguments it runs the first two groups, several rows at a time (2.2 to 3.5 minutes on two cores); arguments select groups (\`host\`, \`machine\`, \`cluster\`) or faults by words in their names. The group \`cluster\` has one cluster for all its rows, in Linux namespaces (containers instead of virtual machines), and so needs Linux and root. When such a machine loses power, files that were written but not synced survive; on a real computer they could be lost. “Exit status, message” are those of the script named in “what is done”. The page is written by \`npm run test:faults -- --write\`; the last column is the time on two cores that were busy with other work as well, without hardware acceleration.

The following also holds for every row:

- No process, port, socket, lock or half-written file is left. (In the group \`cluster\` the machines keep running, so there only the scripts' processes, locks and files are checked.) After \`kill -9\`, this holds once the script has been run again, except for a file \`.NAME.tmp-…\` that was just being written; \`make clean\` removes it.
- The second run, with the command in the column “second run”, ends with status 0.
- Another cluster on the same computer, with its files and a machine of the same name, is untouched; so are the user's own files in the checkout.
`

/** @param took milliseconds @param former the page as it was, for times of what was not run now */
export function asMarkdown(
  groups: readonly { name: string; faults: readonly Fault[] }[],
  took: ReadonlyMap<string, number>,
  former: string,
): string {
  const parts = groups.map(({ name, faults }) => {
    const rows = faults.map((fault) => {
      const then = former.match(
        new RegExp(`^\\| ${escaped(fault.name)} \\|.*\\| ([^|]*) \\|$`, 'm'),
      )
      const time = took.get(fault.name)
      const shown = time === undefined ? (then?.[1] ?? '') : `${(time / 1000).toFixed(0)} s`
      const message = (fault.says ?? []).map((part) => `“${part}”`).join(' … ')
      const end = fault.exit === 137 ? 'killed' : `${fault.exit}${message && `: ${message}`}`
      const again = fault.again ? `\`${fault.again.join(' ').replace('bin/', './bin/')}\`` : '–'
      const cells = [fault.name, fault.done, end, holdsOf(fault), again, shown]
      return `| ${cells.map((cell) => cell.replaceAll('|', '\\|')).join(' | ')} |`
    })
    const head = '| fault | what is done | exit status, message | what holds | second run | takes |'
    return [`## ${titles[name] ?? name}`, '', head, '|---|---|---|---|---|---|', ...rows].join('\n')
  })
  return `${[introduction.trim(), ...parts].join('\n\n')}\n`
}

const titles: Readonly<Record<string, string>> = {
  host: 'On this computer: scripts and files',
  machine: 'With a real QEMU, or the simulated installer',
  cluster: 'With a whole cluster',
}

function holdsOf({ holds, shortFormOf }: Fault): string {
  return shortFormOf ? `${holds} (see also \`test/integration/${shortFormOf}.test.mts\`)` : holds
}

function escaped(text: string): string {
  return text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')
}
